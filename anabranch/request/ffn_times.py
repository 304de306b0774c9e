"""What FFN halves that other processes compute cost: a step's, and a request's over all its steps."""

from __future__ import annotations

import msgspec

from anabranch.bounds import Count, Seconds


class FfnTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times of layers one after the other; a layer's are those of its last answer, and add up to what it waited.

    Attributes:
        queue_s: at FFN workers, until the product began.
        compute_s: products, with whatever rows they were merged.
        way_s: the rest: there and back, sent again, and until the attention worker looked.
        num_answers: answers that counted.
        merged_rows: rows of the products that these came from.
    """

    queue_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    way_s: Seconds = 0.0
    num_answers: Count = 0
    merged_rows: Count = 0

    def __add__(self, other: FfnTimes) -> FfnTimes:
        return FfnTimes(
            queue_s=self.queue_s + other.queue_s,
            compute_s=self.compute_s + other.compute_s,
            way_s=self.way_s + other.way_s,
            num_answers=self.num_answers + other.num_answers,
            merged_rows=self.merged_rows + other.merged_rows,
        )


class FfnTraffic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an attention worker's first rank has sent to FFN workers since it started; its other ranks send as much.

    Attributes:
        num_calls, num_rows: sent, each sending counted.
        num_retries: calls that had to go to another FFN worker.
        num_second: calls that were late and went to a second one too.
        num_answers: that counted.
        queue_s, compute_s: of these, all together.
        merged_rows: rows of the products that these came from.
        stepping_s: in which some lane had a step.
        waited_s: of this, in which no lane could go on.
    """

    num_calls: Count = 0
    num_rows: Count = 0
    num_retries: Count = 0
    num_second: Count = 0
    num_answers: Count = 0
    queue_s: Seconds = 0.0
    compute_s: Seconds = 0.0
    merged_rows: Count = 0
    stepping_s: Seconds = 0.0
    waited_s: Seconds = 0.0

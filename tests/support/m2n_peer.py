"""The other process of the M2N tests: a node or a rank that is told what to do on standard input.

Every line of JSON is answered with one.
    {"do": "address"}                                -> listener's addresses
    {"do": "serve"}                                  -> {}      answers every call from now on, in a thread
    {"do": "links"}                                  -> {"links": n}
    {"do": "connect", "addresses": {...}}            -> {}      a rank's link to a node
    {"do": "send", "first": t, "times": n}           -> {}      calls `first` to `first + n - 1`
    {"do": "receive", "times": n}                    -> {"tickets": [...]}    waits for n right answers
"""

from __future__ import annotations

import json
import sys
import threading

from benchmarks.m2n_ends import next_answer
from tests.support.m2n import a_call, an_answer, assert_same, process_shape
from transport.m2n import Link, Listener, create_link_maker, create_listener


def serve(listener: Listener) -> None:
    while True:
        listener.wait(1.0)
        for arrived in listener.poll():
            listener.answer(arrived, an_answer(arrived.call))


def main(backend: str, hidden_size: int) -> None:
    shape = process_shape(hidden_size)
    listener = create_listener(shape, backend)
    maker = create_link_maker(shape, backend)
    links: list[Link] = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, object] = {}
        match command["do"]:
            case "address":
                answer = dict(listener.addresses)
            case "serve":
                threading.Thread(target=serve, args=(listener,), daemon=True).start()
            case "links":
                answer = {"links": listener.num_links}
            case "connect":
                links.append(maker.dial(command["addresses"], "node").attach())
            case "send":
                for ticket in range(command["first"], command["first"] + command["times"]):
                    links[-1].send(a_call(ticket, shape, num_rows=shape.max_rows))
            case "receive":
                tickets = []
                for _ in range(command["times"]):
                    got = next_answer(links[-1], maker)
                    assert_same(got, an_answer(a_call(got.ticket, shape, num_rows=shape.max_rows)))
                    tickets.append(got.ticket)
                answer = {"tickets": sorted(tickets)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

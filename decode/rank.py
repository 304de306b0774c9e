"""`python -m decode.rank`: a rank of a decode worker other than the first, which lives in the worker's own process."""

from runtime.generation.rank import GenerationRank, generation_room
from runtime.rank_process import run_rank

ROOM = generation_room("decode.rank", GenerationRank)

if __name__ == "__main__":
    run_rank(ROOM)

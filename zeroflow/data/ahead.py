"""Preparing the next mini-batches in threads while the current one is worked on.

Pillow's decoders and torch's operations let other Python threads run, so threads suffice. What a maker makes may depend on
nothing but itself: then the results are the same, bit for bit, whatever the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

T = TypeVar("T")


def prefetched(makers: Iterable[Callable[[], T]], threads: int) -> Generator[T, None, None]:
    """What each maker makes, in order, made by ``threads`` threads that run ahead of the consumer.

    Nothing is made before the first result is asked for; at most ``threads`` results are made or waiting beside the one
    that was handed out. An error is raised in place of the result whose maker raised it. When the consumer stops (the
    iterator is closed, or nobody holds it any more), makers that have not begun are left out and the threads end.

    Args:
        makers: read in the consumer's thread, one by one.
        threads: 0: each is called when its result is asked for.
    """
    if not threads:
        for make in makers:
            yield make()
        return
    waiting_makers = iter(makers)
    # One thread for torch in each: the mini-batches are what runs in parallel.
    pool = ThreadPoolExecutor(threads, "zeroflow-loader", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = deque(pool.submit(make) for make in islice(waiting_makers, threads))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make) for make in islice(waiting_makers, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)

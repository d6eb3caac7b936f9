"""Prefetch mini-batches in threads.

Pillow's decoders and torch's operations release the GIL, so threads suffice. A maker's result must depend on the maker alone:
then the results are the same, bit for bit, whatever the number of threads.
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
    """The results of all makers, in order, computed by ``threads`` threads ahead of the consumer.

    Nothing is computed before the first result is requested; at most ``threads`` further results are in progress or waiting.
    An error is raised in place of the result whose maker raised it. When the consumer stops (the iterator is closed or garbage
    collected), makers that have not started are skipped and the threads end.

    Args:
        makers: functions without arguments, read in the consumer's thread, one by one.
        threads: number of threads; 0: call each maker when its result is requested.
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

"""The time of work that a GPU does later than the host asks for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class Stopwatch:
    """Adds up what runs inside of `on`: by events on CUDA, so that measuring never waits for the GPU."""

    host: float = 0.0
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            span = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            span[0].record(stream)
            yield
            span[1].record(stream)
            self.spans.append(span)
        else:
            started = time.perf_counter()
            yield
            self.host += time.perf_counter() - started

    def seconds(self) -> float:
        """All of it; to be asked where the work is done anyway, as this waits for its end."""
        total = self.host
        for start, end in self.spans:
            end.synchronize()
            total += start.elapsed_time(end) / 1000
        return total

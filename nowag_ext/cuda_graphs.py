"""Graphs on a GPU: CUDA's own."""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import partial

import torch

from nowag_ext.graphs import Call, Captured, NoGraphError
from nowag_ext.siblings import Joining, Learning, Siblings


class CudaGraphs:
    """Those of CUDA, on the device given, whichever is current."""

    def first(self, step: Call, device: torch.device) -> Captured:
        """Not captured: what it allocates and looks up, a capture must find done.

        One that waits for the device cannot be captured, and trying it harms the process.
        """
        learning = Learning()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught, learning:
                warnings.simplefilter("always")
                output = step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        waits = [one for one in caught if "synchronizing CUDA operation" in str(one.message)]
        for one in caught:
            if one not in waits:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        if not waits:
            return Captured(output, second=partial(self.second, learning.siblings()))
        where = f"{waits[0].filename}:{waits[0].lineno}"
        return Captured(output, why=f"{where} waits for the device")

    def second(self, siblings: Siblings, step: Call, device: torch.device) -> Captured:
        """Captures a step, and replays it, which does it."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                graph.capture_begin()
                try:
                    with Joining(siblings):
                        output = step()
                except BaseException:
                    with suppress(RuntimeError):  # which only says again that something went wrong
                        graph.capture_end()
                    raise
                graph.capture_end()
        except RuntimeError as error:
            raise NoGraphError(str(error)) from error

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        replay()
        return Captured(output, replay)

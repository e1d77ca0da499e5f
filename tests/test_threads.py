"""Threads: four rewrite one base in training mode while a fifth trains it; nobody notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import peftfx

from .models import Decoder, batch, first

TEXTS = (
    "ia3;fold",
    "prefix_tuning{length=2};prompt_tuning{length=2}",
    "diff_pruning{where=linear};bake",
    "hyperformer{bottleneck=4,dim=4};bake{inputs={task=1}}",
    "lora{rank=2,name=a};lora{rank=2,name=b};bank{names=[a,b],others=keep}",
    "fold",
)


class Trained:
    """A program that another thread trains for as long as the context is open.

    Attributes:
        steps: how many forwards and backwards there were.
        faults: what went wrong in one.
    """

    def __init__(self, program: peftfx.Program) -> None:
        self.program, self.steps = program, 0
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def _train(self) -> None:
        parameters = self.program.named_trainable_parameters()
        while not self._stop.is_set():
            try:
                output = first(self.program(**batch()))
                output.square().mean().backward()
            except Exception as error:
                self.faults.append(repr(error))
                return
            self.faults += [f"no gradient of {n}" for n, p in parameters.items() if p.grad is None]
            if not all(m.training for m in self.program.module.modules()):
                self.faults.append("a module left training mode")
            for parameter in parameters.values():
                parameter.grad = None
            self.steps += 1

    def __enter__(self) -> Trained:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()


def test_four_threads_rewrite_what_a_fifth_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = peftfx.capture(Decoder(layers=1).requires_grad_(False), kwargs=batch())
    program = peftfx.run(base, "lora{rank=2,dropout=0.2,name=mine}").train()
    want = {text: peftfx.run(program, text) for text in TEXTS}

    def rewritten(text: str) -> Callable[[], None]:
        def rewrite() -> None:
            done = peftfx.run(program, text)
            assert done.training and done.text() == want[text].text()
            alike = first(done.eval()(**batch())), first(want[text].fork().eval()(**batch()))
            assert torch.equal(*alike)

        return rewrite

    def saved() -> None:
        directory = tmp_path / threading.current_thread().name
        peftfx.save_program(program, directory)
        done = peftfx.load_program(directory)
        assert torch.equal(first(done(**batch())), first(program.fork().eval()(**batch())))

    jobs: list[Callable[[], Any]] = [*map(rewritten, TEXTS), saved, program.verify]
    with Trained(program) as trained, ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(job) for job in jobs * 2]:
            job.result()
    assert trained.steps > 20 and trained.faults == []

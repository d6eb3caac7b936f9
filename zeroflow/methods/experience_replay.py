"""Experience replay: train on stored samples of earlier tasks along with those of the current one.

Source: ZeroFlow, Eq. 2, after Rolnick et al., "Experience Replay for Continual Learning", NeurIPS 2019. Reservoir: Vitter,
"Random Sampling with a Reservoir", 1985, Algorithm R. Herding: Rebuffi et al., "iCaRL", CVPR 2017, Algorithm 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zeroflow.data.scenario import Batch
from zeroflow.errors import ConfigError
from zeroflow.methods.finetune import FineTuning
from zeroflow.methods.method import MiniBatch, one_of, positive, register_method
from zeroflow.models.backbone import Backbone
from zeroflow.optim import OptimizerInfo


@register_method("replay", "as finetune, beside stored samples of earlier tasks (ZeroFlow, Eq. 2)")
class ExperienceReplay(FineTuning):
    """``L = L_cur / N + (1 - 1/N) L_replay`` with N tasks so far; a mini-batch has as many stored samples as new ones.

    The memory stores positions in the stream's training data; the trial looks up their images and transforms them again.
    """

    needs_head = "class means of old tasks would not follow what is trained on stored samples of them"

    memory: Tensor
    seen: Tensor
    shares: Tensor

    @dataclass(frozen=True)
    class Options(FineTuning.Options):
        """Options of fine-tuning and of the memory.

        Attributes:
            buffer: largest number of stored samples, of all tasks together.
            selection: ``reservoir`` (every sample so far is stored with the same probability) or ``herding`` (at most
                equally many of every class, so ``buffer`` is at least the number of classes, chosen so that their mean
                feature is near the class mean).
        """

        buffer: int = 200
        selection: str = "reservoir"

        def __post_init__(self) -> None:
            super().__post_init__()
            positive(buffer=self.buffer)
            one_of(selection=(self.selection, ("reservoir", "herding")))

    def __init__(self, backbone: Backbone, options: Any = None) -> None:
        super().__init__(backbone, options)
        self.register_buffer("memory", torch.empty(0, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("shares", torch.empty(0, dtype=torch.int64))  # of each class, where samples are herded

    @classmethod
    def stream_refusal(cls, increments: Sequence[int], options: Any) -> str | None:
        earlier = sum(increments[:-1])
        if options.selection == "reservoir" or options.buffer >= earlier:
            return None
        return (
            f"buffer={options.buffer} with selection=herding: no room for one sample of each of the {earlier} classes before the last "
            f"task; expected at least {earlier}, or selection=reservoir"
        )

    def begin_task(self, classes: range, generator: torch.Generator, batches: Iterable[Batch] | None = None) -> None:
        """As in ``Method``.

        Raises:
            ConfigError: herding has no room for a sample of every earlier class, so nothing would be replayed.
        """
        if (why := self.stream_refusal([classes.start, len(classes)], self.options)) is not None:
            raise ConfigError(why)
        super().begin_task(classes, generator, batches)
        self.choices = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))

    def replay(self, count: int, generator: torch.Generator) -> tuple[Tensor, None] | None:
        """Draw stored samples uniformly, each at most once more often than any other."""
        if not len(self.memory):
            return None
        rounds = [torch.randperm(len(self.memory), generator=generator) for _ in range(-(-count // len(self.memory)))]
        return self.memory[torch.cat(rounds)[:count].to(self.memory.device)], None

    def prepare(self, batch: MiniBatch) -> Any:
        if batch.replayed is None or batch.replayed_labels is None:
            return super().prepare(batch)
        both = batch._replace(
            images=torch.cat([batch.images, batch.replayed]), labels=torch.cat([batch.labels, batch.replayed_labels])
        )
        return super().prepare(both)

    def passes(self) -> tuple[int, int]:
        return 0, 2 if len(self.memory) else 1

    def losses(self, inputs: Any) -> Tensor:
        losses = super().losses(inputs)
        if not len(self.memory):
            return losses
        current, replayed = losses.chunk(2)
        tasks = len(self.tasks)
        return current / tasks + (1 - 1 / tasks) * replayed

    @classmethod
    def refusal(cls, optimizer: OptimizerInfo, options: Any) -> str | None:
        if optimizer.estimator.per_example:
            return "it moves every example of a mini-batch on its own, and here a stored sample stands beside each"
        return super().refusal(optimizer, options)

    @torch.no_grad()
    def end_task(self, batches: Iterable[Batch]) -> None:
        super().end_task(batches)
        if self.options.selection == "herding":
            self._herd(batches)
        else:
            self._reservoir(sum(len(labels) for _, labels in batches))

    def _reservoir(self, count: int) -> None:
        """Algorithm R over the task's samples in order: the n-th of the stream is stored with probability size / n."""
        memory, size = self.memory.tolist(), self.options.buffer
        for position in range(int(self.seen), int(self.seen) + count):
            if len(memory) < size:
                memory.append(position)
            elif (place := int(torch.randint(position + 1, (), generator=self.choices))) < size:
                memory[place] = position
        self._keep(memory, count)

    def _herd(self, batches: Iterable[Batch]) -> None:
        """Store equally many samples of every class; old classes are stored best first, so cut them from the end."""
        parts = [(self.features(images, range(1))[:, 0], labels) for images, labels in batches]
        features = F.normalize(torch.cat([part for part, _ in parts]), dim=1)
        labels = torch.cat([label for _, label in parts]).to(features.device)
        quota = self.options.buffer // self.tasks[-1].stop
        first = int(self.seen)
        kept = [old[:quota].tolist() for old in torch.split(self.memory, self.shares.tolist())]
        for label in self.tasks[-1]:
            own = torch.nonzero(labels == label)[:, 0]
            kept.append([first + int(own[i]) for i in herding(features[own], quota)])
        # Not the quota for every class: one with fewer samples has all of them.
        self.shares = torch.tensor([len(of_class) for of_class in kept], device=self.shares.device)
        self._keep([position for of_class in kept for position in of_class], len(labels))

    def _keep(self, memory: list[int], count: int) -> None:
        self.memory = torch.tensor(memory, dtype=torch.int64, device=self.memory.device)
        self.seen += count


def herding(features: Tensor, count: int) -> list[int]:
    """Choose samples greedily so that their mean stays as close as possible to the class mean, best samples first.

    Args:
        features: of one class ``[n, d]``, normalised.
        count: number of samples to choose; all if there are fewer.

    Returns:
        Their indices in the order of choice.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for size in range(1, min(count, len(features)) + 1):
        distance = (mean - (total + features) / size).norm(dim=1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + features[chosen[-1]]
    return chosen

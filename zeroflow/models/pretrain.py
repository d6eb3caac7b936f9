"""Pretrain the embedded backbone on the 245 Quick, Draw! classes that are not in the stream.

``python -m zeroflow.models.pretrain quickdraw245.npz --out DIR`` writes the checkpoint (float16 safetensors, timm's
parameter names, no head) and a JSON record of the recipe and the training curve. The stream's drawings are not read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from zeroflow.data.transforms import as_rgb, random_affine, random_erasing, to_unit
from zeroflow.models.factory import build_timm, embedded_architecture


def mixup(images: Tensor, labels: Tensor, generator: torch.Generator, beta: float) -> tuple[Tensor, Tensor, float]:
    """Mix a batch with a shuffled copy of itself; returns images, the partners' labels, and the weight of the originals."""
    share = float(np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator))).beta(beta, beta))
    partner = torch.randperm(len(labels), generator=generator)
    return share * images + (1 - share) * images[partner], labels[partner], share


def warmup_and_cosine(steps: int) -> Callable[[int], float]:
    """Multiple of the learning rate by step: linear warm-up in the first 20th of all steps, then a cosine to zero."""
    warmup = max(1, steps // 20)

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return rate


@click.command(help=__doc__)
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--epochs", default=60, show_default=True)
@click.option("--batch-size", default=256, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--save-every", default=0, help="Also write the checkpoint after every N epochs (0: only at the end).")
def main(
    data: Path, out: Path, epochs: int, batch_size: int, lr: float, seed: int, device: str, save_every: int
) -> None:
    with np.load(data) as archive:
        pixels = torch.from_numpy(archive["images"])
    classes, per_class = pixels.shape[:2]
    images = pixels.reshape(-1, 1, 28, 28)
    labels = torch.arange(classes).repeat_interleave(per_class)

    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build_timm(*embedded_architecture()).to(device)
    head = nn.Linear(model.num_features, classes).to(device)
    decay = [p for m in (model, head) for p in m.parameters() if p.ndim > 1]
    plain = [p for m in (model, head) for p in m.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    steps = epochs * (len(labels) // batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(steps))
    out.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        save_file({k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}, out / name)

    started, curve = time.perf_counter(), []
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        losses: list[float] = []
        for first in range(0, len(labels) - batch_size + 1, batch_size):
            chosen = order[first : first + batch_size]
            batch = random_erasing(random_affine(to_unit(images[chosen]), generator), generator)
            batch, partners, share = mixup(as_rgb(batch), labels[chosen], generator, beta=0.3)
            target, partners = labels[chosen].to(device), partners.to(device)
            with torch.autocast(device.split(":")[0], dtype=torch.bfloat16):
                logits = head(model(batch.to(device)))
                loss = share * F.cross_entropy(logits, target, label_smoothing=0.1)
                loss = loss + (1 - share) * F.cross_entropy(logits, partners, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        curve.append(sum(losses) / len(losses))
        click.echo(f"epoch {epoch + 1}/{epochs}  loss {curve[-1]:.4f}  {time.perf_counter() - started:.0f} s")
        if save_every and (epoch + 1) % save_every == 0:
            save(f"epoch{epoch + 1:03d}.safetensors")
    save("quickdraw_vit.safetensors")
    record = {
        "data": data.name, "classes": classes, "drawings": len(labels), "epochs": epochs, "batch_size": batch_size,
        "lr": lr, "seed": seed, "steps": steps, "loss_per_epoch": curve, "torch": torch.__version__,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    (out / "quickdraw_vit.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

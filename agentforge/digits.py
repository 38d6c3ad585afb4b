"""digits-mlp: a small classifier with real labels, trained in seconds.

scikit-learn's handwritten digits (1,797 pictures of 8 x 8 pixels, ten classes), split once into 1,347 to train on and
450 to test on.  A language model's accuracy moves by half a point from noise alone; here the effect of a compression on
accuracy is visible at once.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

MODEL_TYPE = "agentforge-digits-mlp"
HIDDEN = (128, 64)
EPOCHS = 60


class DigitsMLP(nn.Module):
    """64 pixels in, ten logits out.  `layers` are the hidden linear layers, `head` is the output layer."""

    def __init__(self, hidden: tuple[int, ...] = HIDDEN) -> None:
        super().__init__()
        sizes = (64, *hidden)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: float[n, 64] in 0..1.  Returns logits, float[n, 10]."""
        for layer in self.layers:
            pixels = torch.relu(layer(pixels))
        logits: torch.Tensor = self.head(pixels)
        return logits

    def get_output_embeddings(self) -> nn.Module:
        """The output layer, by transformers' name for it."""
        return self.head


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures and labels: train float[1347, 64], int[1347], test float[450, 64], int[450]."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        (pixels / 16).astype("float32"), labels, test_size=450, random_state=0, stratify=labels
    )
    return tuple(torch.from_numpy(a) for a in (train_x, train_y, test_x, test_y))  # type: ignore[return-value]


def train(seed: int = 0) -> tuple[DigitsMLP, dict[str, Any]]:
    """The trained model and its configuration; one thread, so that it is the same model every time on a machine."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        model = DigitsMLP()
        pixels, labels, _, _ = data()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(pixels)).split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(pixels[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval(), {"model_type": MODEL_TYPE, "hidden": list(HIDDEN), "seed": seed, "epochs": EPOCHS}

"""Score-CAM against the grad-cam package, and the authors' code and Algorithm 1 carried out one image and one map at a time."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.resnet.parity import settled
from paperzoo.papers.interpretability.grad_cam.parity import Small, fingerprint
from paperzoo.papers.interpretability.score_cam.technique import ScoreCAM


class Fine(nn.Module):
    """A network whose explained layer is as large as its input, so that no upsampling is in the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 7, 3, padding=1), nn.Conv2d(7, 9, 3, 2, 1)
        self.relu, self.head = nn.ReLU(), nn.Linear(9 * 4, 5)
        for p in self.parameters():
            p.data.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.relu(self.conv1(x))).tanh()
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def cases() -> Iterator[Case]:
    from pytorch_grad_cam import ScoreCAM as Package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    package = f"grad-cam {version('grad-cam')}"
    torch.manual_seed(0)
    net, x, classes = Fine().eval(), torch.randn(3, 3, 13, 18), [0, 4, 2]

    def reference(x: Tensor) -> Tensor:
        targets = [ClassifierOutputTarget(c) for c in classes]
        with Package(net, [net.conv1]) as cam, contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            return torch.from_numpy(cam(x, targets))

    yield Case("maps as large as the image", lambda x: ScoreCAM(net, "conv1", batch_size=4)(x, classes), reference, (x,),
               package, atol=1e-5, note="the package upsamples with aligned corners, nothing here; an in-place ReLU would change its maps")  # fmt: skip

    resnet = settled(resnet18(num_classes=10)).eval()
    photographs = torch.randn(2, 3, 64, 96)
    for net, layer, images, target in (
        (Small("inplace").eval(), "conv2", torch.randn(3, 3, 22, 26), [3, 0, 1]),
        (resnet, "layer3", photographs, [7, 1]),
        (resnet, "layer4", photographs, [7, 7]),
    ):
        cam, slow = ScoreCAM(net, layer, batch_size=100), Slow(net, layer)
        yield Case(f"{type(net).__name__} {layer}, Algorithm 1", lambda x, cam=cam, t=target: cam.coarse(x, t),
                   lambda x, slow=slow, t=target: torch.stack([slow.paper(i, c) for i, c in zip(x, t, strict=True)]),
                   (images,), "Algorithm 1, a map at a time", rtol=1e-4, atol=1e-5)  # fmt: skip
        cam = ScoreCAM(net, layer, confidence="probability", softmax=False, baseline=torch.full((1,), -1e4))
        yield Case(f"{type(net).__name__} {layer}, the authors' code", lambda x, cam=cam, t=target: released(cam, x, t),
                   lambda x, slow=slow, t=target: torch.stack([slow.released(i, c) for i, c in zip(x, t, strict=True)]),
                   (images,), "cam/scorecam.py of the authors, a map at a time", rtol=1e-4, atol=1e-5)  # fmt: skip

    # A callable target for the predicted class is no target at all; the softmax cancels the baseline.
    best = resnet(photographs[:1]).argmax(1)
    yield Case("predicted class, callable, baseline",
               lambda x: (ScoreCAM(resnet, "layer4")(x), ScoreCAM(resnet, "layer4", baseline=torch.ones(3, 1, 1))(x)),
               lambda x: (ScoreCAM(resnet, "layer4")(x, lambda logits: logits[:, best[0]]),
                          ScoreCAM(resnet, "layer4")(x, best)), (photographs[:1],), "identity", atol=1e-4)  # fmt: skip

    net = settled(resnet18(num_classes=10)).train()
    before = fingerprint(net)

    def after() -> dict:
        with torch.inference_mode():
            ScoreCAM(net, "layer4")(photographs)
        return fingerprint(net)

    yield Case("the model is left as it was", after, lambda: before, (), "its state before, hooks and flags included",
               rtol=0, atol=0)  # fmt: skip


def released(cam: ScoreCAM, x: Tensor, target: list[int]) -> Tensor:
    """Ours with the weights of the authors' code: probabilities themselves, without the baseline's."""
    maps, classes = cam.look(x, target)
    increase, alive = cam.increases(x, maps, classes)
    with torch.no_grad():
        nothing = cam.model(cam.baseline.expand_as(x)).softmax(1).gather(1, classes[:, None])
    return ((increase + nothing) * alive)[:, :, None, None].mul(maps).sum(1).relu()


class Slow:
    """One image, one map, one forward pass after the other."""

    def __init__(self, net: nn.Module, layer: str) -> None:
        self.net, self.layer = net, layer

    @torch.no_grad()
    def masks(self, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each map of the layer that is not constant, and the image under it."""
        seen: list[Tensor] = []
        hook = self.net.get_submodule(self.layer).register_forward_hook(lambda m, a, o: seen.append(o[0].clone()))
        self.net(image[None].clone())
        hook.remove()
        for found in seen[0]:
            large = F.interpolate(found[None, None], image.shape[1:], mode="bilinear")[0, 0]
            if large.max() > large.min():
                yield found, image * (large - large.min()) / (large.max() - large.min())

    @torch.no_grad()
    def paper(self, image: Tensor, target: int) -> Tensor:
        blank = float(self.net(torch.zeros_like(image)[None])[0, target])
        maps, scores = [], []
        for found, masked in self.masks(image):
            maps.append(found)
            scores.append(float(self.net(masked[None])[0, target]) - blank)
        weights = torch.tensor(scores, dtype=torch.float64).exp()
        weights = weights / weights.sum()
        return sum(w * m.double() for w, m in zip(weights, maps, strict=True)).clamp_min(0).float()

    @torch.no_grad()
    def released(self, image: Tensor, target: int) -> Tensor:
        total = torch.zeros(())
        for found, masked in self.masks(image):
            total = total + float(self.net(masked[None]).softmax(1)[0, target]) * found
        return total.clamp_min(0)

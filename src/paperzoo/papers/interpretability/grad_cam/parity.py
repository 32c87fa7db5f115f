"""Grad-CAM against captum, the grad-cam package, and the identities that the paper states."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import deepcopy
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.explaining import find_layer
from paperzoo.engine.parity import Case
from paperzoo.papers.classification.resnet.model import resnet18
from paperzoo.papers.classification.resnet.parity import settled
from paperzoo.papers.interpretability.grad_cam.technique import GradCAM, GuidedBackprop, GuidedGradCAM


class Small(nn.Module):
    """Convolutions with in-place, functional or plain ReLUs, then a hidden layer: not a GAP network."""

    def __init__(self, relu: str) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, padding=1)
        self.relu1, self.relu2, self.relu3 = (nn.ReLU(inplace=relu == "inplace") for _ in range(3))
        self.head, self.out = nn.Linear(12 * 16, 20), nn.Linear(20, 5)
        self.functional = relu == "functional"
        for p in self.parameters():
            p.data.mul_(4)  # maps and gradients of order one, so that an absolute tolerance means something

    def forward(self, x: Tensor) -> Tensor:
        r1, r2, r3 = (F.relu, torch.relu, Tensor.relu_) if self.functional else (self.relu1, self.relu2, self.relu3)
        x = r2(self.conv2(r1(self.conv1(x))))
        return self.out(r3(self.head(F.adaptive_avg_pool2d(x, 4).flatten(1))))


def cases() -> Iterator[Case]:
    exact = {"rtol": 1e-5, "atol": 1e-9}
    captum, package = f"captum {version('captum')}", f"grad-cam {version('grad-cam')}"
    from captum.attr import GuidedBackprop as CaptumGuided
    from captum.attr import GuidedGradCam as CaptumGuidedGradCam
    from captum.attr import LayerGradCam
    from pytorch_grad_cam import GradCAM as PackageGradCAM
    from pytorch_grad_cam.guided_backprop import GuidedBackpropReLUModel
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    torch.manual_seed(0)
    plain, inplace, functional = (Small(kind).eval() for kind in ("plain", "inplace", "functional"))
    inplace.load_state_dict(plain.state_dict())
    functional.load_state_dict(plain.state_dict())
    x, classes = torch.randn(4, 3, 22, 26), torch.tensor([0, 4, 2, 2])

    def captum_cam(x: Tensor) -> Tensor:
        return quietly(LayerGradCam(plain, plain.conv2), x, target=classes, relu_attributions=True)[:, 0]

    for name, net in (("plain", plain), ("in-place", inplace), ("functional", functional)):
        ours = GradCAM(net, net.conv2)
        yield Case(f"coarse map, {name} ReLU", lambda x, ours=ours: ours.coarse(x, classes), captum_cam, (x,), captum,
                   **exact)  # fmt: skip
        ours = GuidedBackprop(net)
        yield Case(f"guided backprop, {name} ReLU", lambda x, ours=ours: ours(x, classes),
                   lambda x: quietly(CaptumGuided(plain), x, target=classes), (x,), captum, **exact)  # fmt: skip
        ours = GuidedGradCAM(net, "conv2")
        yield Case(f"Guided Grad-CAM, {name} ReLU", lambda x, ours=ours: ours(x, classes),
                   lambda x: quietly(CaptumGuidedGradCam(plain, plain.conv2), x, target=classes,
                                     interpolate_mode="bilinear"), (x,), captum, **exact)  # fmt: skip

    net = settled(resnet18(num_classes=10)).eval()
    x = torch.randn(2, 3, 96, 64)
    for layer in ("layer4", "layer3", "layer2.1.conv2"):
        targets = [ClassifierOutputTarget(7), ClassifierOutputTarget(1)]

        def reference(x: Tensor, layer: str = layer, targets: list = targets) -> Tensor:
            with PackageGradCAM(net, [net.get_submodule(layer)]) as cam:
                return torch.from_numpy(cam(x, targets))

        ours = GradCAM(net, layer)
        yield Case(f"resnet18 {layer}", lambda x, ours=ours: ours(x, [7, 1]), reference, (x,), package, atol=1e-4)

    def guided(x: Tensor) -> Tensor:
        each = [
            GuidedBackpropReLUModel(deepcopy(net), device="cpu")(row[None].clone(), 3) for row in x
        ]  # it edits the model
        return torch.stack([torch.from_numpy(e).permute(2, 0, 1) for e in each])

    yield Case("resnet18 guided backprop", lambda x: GuidedBackprop(net)(x, 3), guided, (x,), package,
               atol=1e-7, note="one shared in-place ReLU module per block")  # fmt: skip

    # With global average pooling and one linear layer Grad-CAM is CAM, up to the number of places (sec. 3.1).
    net = settled(resnet18(num_classes=10)).eval()
    for p in net.parameters():
        p.requires_grad_(False)

    def cam(x: Tensor) -> Tensor:
        maps = net.stages(x)[-1]
        weights = net.fc.weight[net(x).argmax(1)]
        return torch.einsum("bk,bkhw->bhw", weights, maps).clamp_min(0) / (maps.shape[2] * maps.shape[3])

    yield Case("GAP network: CAM", lambda x: GradCAM(net, "layer4").coarse(x), cam, (x,), "CAM, eq. (3) to (8)",
               atol=1e-7, note="weights frozen; target is the predicted class")  # fmt: skip

    def counterfactual(x: Tensor) -> Tensor:
        maps = net.stages(x)[-1]
        return torch.einsum("k,bkhw->bhw", -net.fc.weight[6], maps).clamp_min(0) / (maps.shape[2] * maps.shape[3])

    yield Case("counterfactual", lambda x: GradCAM(net, "layer4").coarse(x, lambda logits: -logits[:, 6]),
               counterfactual, (x,), "sec. 3.3: negated gradients", atol=1e-7)  # fmt: skip

    net = settled(resnet18(num_classes=10)).train()
    net.layer1.eval()
    before = fingerprint(net)

    def after() -> dict:
        with torch.inference_mode():
            GuidedGradCAM(net, find_layer(net, x))(x)
            try:
                GradCAM(net, "fc")(x, 1)
            except ValueError:
                pass  # no height and width there: refused, and nothing left behind
        return fingerprint(net)

    yield Case("the model is left as it was", after, lambda: before, (), "its state before, hooks and flags included",
               rtol=0, atol=0)  # fmt: skip


def quietly(method, x: Tensor, **options) -> Tensor:
    """A captum attribution without its announcements of hooks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method.attribute(x, **options)


def fingerprint(net: nn.Module) -> dict:
    """Everything an explanation could leave behind."""
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "training": [module.training for module in net.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in net.modules()],
        "gradients": [p.grad is not None for p in net.parameters()],
        "wanted": [p.requires_grad for p in net.parameters()],
    }

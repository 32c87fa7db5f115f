"""Writes golden.safetensors: what the released code (github dbolya/yolact, commit 902073d) computes from weights made by a rule.

python -m paperzoo.papers.segmentation.yolact.golden PATH_OF_A_CHECKOUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from paperzoo.papers.detection.yolov3.golden import noise
from paperzoo.papers.segmentation.yolact.model import Yolact, yolact_resnet50

FILE = Path(__file__).with_name("golden.safetensors")
SIDE = 96  # pixels of the images
THRESHOLD = 0.02  # made-up weights are sure of little
ROWS = slice(0, None, 17)  # of the anchors, those that are compared
CELLS = slice(1, None, 5)  # of the prototypes' rows and columns
SHOWN = 20  # detections whose masks are compared
PICTURE = (44, 60)  # height and width of the picture that masks are enlarged to
GAINS = {"conf_layer": 1.5, "mask_layer": -8.0, "proto_net.10": 40.0}  # masks with holes, and unsure classes
GRADIENTS = (
    "proto_net.0.bias",
    "proto_net.10.bias",
    "prediction_layers.0.upfeature.0.bias",
    "prediction_layers.0.bbox_layer.bias",
    "prediction_layers.0.conf_layer.bias",
    "prediction_layers.0.mask_layer.bias",
    "semantic_seg_conv.bias",
    "fpn.lat_layers.0.bias",
    "fpn.downsample_layers.1.bias",
)


@torch.no_grad()
def write_weights(model: nn.Module) -> nn.Module:
    """Every parameter and buffer filled with `noise`, by the order of our names."""
    state = model.state_dict()
    for phase, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("num_batches_tracked"):
            continue
        values = noise(tuple(value.shape), phase) - 0.5
        if value.ndim == 4:
            gain = next((g for part, g in GAINS.items() if part in name), 3.0)
            value.copy_(values * gain / value[0].numel() ** 0.5)
        elif ".bn" in name or ".downsample.1" in name:
            value.copy_(0.3 * values if name.endswith(("bias", "mean")) else 0.6 + values)
        else:
            value.copy_(0.3 * values)
    return model


def made() -> Yolact:
    model = write_weights(yolact_resnet50(score_threshold=THRESHOLD))
    return model.eval()


def pictures() -> Tensor:
    return noise((2, 3, SIDE, SIDE)) * 2 - 1


def targets() -> list[dict[str, Tensor]]:
    """Two objects that overlap and a small one; and a picture with one. No two anchors overlap an object equally."""
    rows = [
        [(6.3, 10.9, 51.2, 62.1, 3), (40.6, 30.2, 90.7, 88.4, 17), (70.8, 4.1, 88.3, 20.6, 3)],
        [(20.2, 24.7, 70.9, 66.4, 60)],
    ]
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    batch = []
    for row in rows:
        table = torch.tensor(row, dtype=torch.float32)
        boxes = table[:, :4, None, None]
        middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        masks = ((x - middle[:, 0]) / half[:, 0]) ** 2 + ((y - middle[:, 1]) / half[:, 1]) ** 2 <= 1
        batch.append({"boxes": table[:, :4], "labels": table[:, 4].long(), "masks": masks})
    return batch


def released_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a ResNet variant to the released ones."""
    renamed = {}
    for name, value in state.items():
        parts = name.removeprefix("backbone.body.").split(".")
        if name.startswith("backbone.body.layer"):
            name = ".".join(["backbone", "layers", str(int(parts[0][5:]) - 1), *parts[1:]])
        renamed[name.replace("backbone.body.", "backbone.")] = value
    return renamed


def main() -> None:
    from safetensors.torch import save_file

    torch.cuda.current_device = lambda: 0  # asked for when the code is imported
    torch.cuda.device_count = lambda: 2  # without TorchScript
    sys.path.insert(0, sys.argv[1])
    from data.config import cfg, set_cfg  # type: ignore

    set_cfg("yolact_resnet50_config")
    cfg.max_size, cfg.nms_conf_thresh, cfg.mask_proto_debug = SIDE, THRESHOLD, False
    from layers.modules import MultiBoxLoss  # type: ignore
    from layers.output_utils import postprocess  # type: ignore
    from yolact import Yolact as Released  # type: ignore

    ours, theirs = made(), Released()
    theirs.load_state_dict(released_names(ours.state_dict()))
    print(sum(p.numel() for p in theirs.parameters()), "parameters")
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    images, wanted = pictures(), targets()
    raw = theirs(images)
    size = torch.tensor([SIDE] * 4)
    rows = [torch.cat([t["boxes"] / size, t["labels"][:, None].float()], dim=1) for t in wanted]
    loss = MultiBoxLoss(cfg.num_classes, 0.5, 0.4, 3)
    losses = loss(theirs, raw, rows, [t["masks"].float() for t in wanted], [0, 0])
    print({name: float(value.detach()) for name, value in losses.items()})
    parameters = dict(theirs.named_parameters())
    found = torch.autograd.grad(sum(losses.values()), [parameters[name] for name in GRADIENTS])
    golden = {f"gradient.{name}": g for name, g in zip(GRADIENTS, found, strict=True)}
    golden |= {f"loss.{name}": value.detach() for name, value in losses.items()}
    golden |= {
        "logits": raw["conf"][:, ROWS],
        "deltas": raw["loc"][:, ROWS],
        "coefficients": raw["mask"][:, ROWS],
        "prototypes": raw["proto"].permute(0, 3, 1, 2)[:, :, CELLS, CELLS],
        "semantic": raw["segm"][:, :, ::4, ::4],
    }
    theirs.eval()
    theirs.detect.use_fast_nms = True
    with torch.no_grad():
        for i, detection in enumerate(theirs(images)):
            boxes = detection["detection"]["box"].clone()  # parts of the sides; the next line writes over them
            classes, scores, _, masks = postprocess([detection], PICTURE[1], PICTURE[0])
            masks = masks[:SHOWN].bool()
            print(len(classes), "detections", scores[:3], scores[-3:], masks.float().mean())
            golden |= {f"{i}.classes": classes, f"{i}.scores": scores, f"{i}.boxes": boxes}
            golden[f"{i}.masks"] = torch.from_numpy(packed(masks))
    save_file({name: value.detach().contiguous().clone() for name, value in golden.items()}, FILE)
    print(FILE.stat().st_size, "bytes")


def packed(masks: Tensor):
    import numpy as np

    return np.packbits(masks.numpy().reshape(len(masks), -1), axis=1)


if __name__ == "__main__":
    main()

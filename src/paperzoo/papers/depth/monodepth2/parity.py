"""Parity of Monodepth2: the networks on torchvision's ResNets, view synthesis pixel by pixel in numpy, the losses written out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.parity import Case, Pair
from paperzoo.papers.depth.monodepth2 import model, technique


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from networks()
    yield from geometry()
    yield from losses()


# -- networks ------------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The depth network on a torchvision ResNet, level by level with literal numbers; convolutions in the released files' order."""

    def __init__(self, body: nn.Module, encoder: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"encoder": body})  # our names, so that gradients are compared by name
        plan = [(encoder[4], 256), (256 + encoder[3], 256), (256, 128), (128 + encoder[2], 128), (128, 64)]
        plan += [
            (64 + encoder[1], 64),
            (64, 32),
            (32 + encoder[0], 32),
            (32, 16),
            (16, 16),
            (16, 1),
            (32, 1),
            (64, 1),
            (128, 1),
        ]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, padding_mode="reflect") for a, b in plan)

    def take(self, ours: model.DepthNetwork) -> Plain:
        """The weights of our network, through the released files' names."""
        official = {k: v for k, v in official_names(ours).items() if not k.startswith("encoder.fc.")}
        self.encoder["encoder"].load_state_dict(
            {k.removeprefix("encoder."): v for k, v in official.items() if k.startswith("encoder.")}
        )
        for i, conv in enumerate(self.convs):
            name = f"decoder.{i}.conv.conv" if i < 10 else f"decoder.{i}.conv"
            conv.load_state_dict({"weight": official[f"{name}.weight"], "bias": official[f"{name}.bias"]})
        return self.train(ours.training)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        r, c, outputs = self.encoder["encoder"], self.convs, []
        f0 = F.relu(r.bn1(r.conv1((images - 0.45) / 0.225)))
        f1 = r.layer1(F.max_pool2d(f0, 3, 2, 1))
        f2 = r.layer2(f1)
        f3 = r.layer3(f2)
        x = r.layer4(f3)
        for i, skip in enumerate((f3, f2, f1, f0, None)):
            x = F.elu(c[2 * i](x)).repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = F.elu(c[2 * i + 1](x if skip is None else torch.cat([x, skip], 1)))
            if i > 0 and (self.training or i == 4):
                outputs.insert(0, 1 / (1 + torch.exp(-c[14 - i](x))))
        return outputs if self.training else outputs[0]


def official_names(network: nn.Module) -> dict[str, Tensor]:
    """A network's tensors as the released files name them, with the classifier that they still hold."""
    state = {k.split(".", 1)[1]: v.clone() for k, v in network.state_dict().items()}
    return state | {"encoder.fc.weight": torch.zeros(1000, 512), "encoder.fc.bias": torch.zeros(1000)}


def networks() -> Iterator[Case]:
    import torchvision
    from torchvision.models import resnet18, resnet50

    against = f"torchvision {torchvision.__version__} ResNet and a decoder with literal numbers"
    for name, body, encoder, size, train in (
        ("monodepth2_resnet18", resnet18, (64, 64, 128, 256, 512), (64, 96), False),
        ("monodepth2_resnet18", resnet18, (64, 64, 128, 256, 512), (64, 64), True),
        ("monodepth2_resnet50", resnet50, (64, 256, 512, 1024, 2048), (64, 64), False),
    ):
        ours = getattr(model, name)().train(train)
        plain = body(weights=None)
        plain.fc = nn.Identity()
        ours.load_state_dict(model.from_official(official_names(ours)))
        reference = Plain(plain, encoder).take(ours)
        x = torch.rand(2, 3, *size)
        if train:  # fp32 gradients through batch norms of few values carry rounding of a percent
            ours, reference, x = ours.double(), reference.double(), x.double()
        yield Case(
            f"{name} {'train' if train else 'eval'} {size}",
            ours,
            reference,
            (x,),
            against,
            gradients=train,
            note="in double precision" if train else "",
        )

    pose = model.monodepth2_pose_resnet18().eval()
    body = resnet18(weights=None)
    body.conv1, body.fc = nn.Conv2d(6, 64, 7, 2, 3, bias=False), nn.Identity()
    body.load_state_dict(
        {k.removeprefix("pose_encoder.encoder."): v for k, v in pose.state_dict().items() if "pose_encoder" in k}
    )
    body.eval()

    def plain_pose(frames: Tensor) -> tuple[Tensor, Tensor]:
        x = body.maxpool(body.relu(body.bn1(body.conv1((frames - 0.45) / 0.225))))
        x = body.layer4(body.layer3(body.layer2(body.layer1(x))))
        for i, pad in enumerate((0, 1, 1)):
            x = F.conv2d(x, pose.pose.net[i].weight, pose.pose.net[i].bias, padding=pad).clamp(min=0)
        x = F.conv2d(x, pose.pose.net[3].weight, pose.pose.net[3].bias).mean(3).mean(2) / 100
        return x[:, 0:3], x[:, 3:6]

    yield Case("monodepth2_pose_resnet18", pose, plain_pose, (torch.rand(3, 6, 64, 96),), against, atol=1e-7)

    classifier = resnet18(weights=None)
    pose.load_backbone(classifier.state_dict())
    image = torch.rand(2, 3, 64, 64)
    yield Case(
        "a pose encoder from a classifier sees a frame laid on itself as the classifier sees the frame",
        lambda x: pose.pose_encoder.encoder.conv1(torch.cat([x, x], 1)),
        classifier.conv1,
        (image,),
        "identity: kernels repeated and halved",
    )


# -- geometry ------------------------------------------------------------------------------------------------------------


def slow_places(depth: np.ndarray, camera: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Pixel by pixel: lift to a point, move it, project it. (H, W), (3, 3), (4, 4) -> (H, W, 2)."""
    height, width = depth.shape
    places = np.zeros((height, width, 2))
    for y in range(height):
        for x in range(width):
            z = depth[y, x]
            point = np.array([(x - camera[0, 2]) / camera[0, 0] * z, (y - camera[1, 2]) / camera[1, 1] * z, z, 1.0])
            moved = motion @ point
            places[y, x] = (
                camera[0, 0] * moved[0] / moved[2] + camera[0, 2],
                camera[1, 1] * moved[1] / moved[2] + camera[1, 2],
            )
    return places


def slow_read(source: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Bilinear reading with the border repeated. (C, H, W), (H, W, 2) -> (C, H, W)."""
    channels, height, width = source.shape
    out = np.zeros((channels, *places.shape[:2]))
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            x, y = min(max(places[i, j, 0], 0), width - 1), min(max(places[i, j, 1], 0), height - 1)
            x0, y0 = int(np.floor(x)), int(np.floor(y))
            x1, y1, u, v = min(x0 + 1, width - 1), min(y0 + 1, height - 1), x - x0, y - y0
            upper = (1 - u) * source[:, y0, x0] + u * source[:, y0, x1]
            lower = (1 - u) * source[:, y1, x0] + u * source[:, y1, x1]
            out[:, i, j] = (1 - v) * upper + v * lower
    return out


def geometry() -> Iterator[Case]:
    import scipy
    from scipy.spatial.transform import Rotation

    vectors = torch.tensor([[0.3, -0.2, 0.9], [1e-3, 2e-3, -1e-3], [0.0, 0.0, np.pi / 2], [2.0, -1.0, 0.5]])
    yield Case(
        "rotation",
        technique.rotation,
        lambda v: torch.from_numpy(Rotation.from_rotvec(v.numpy()).as_matrix()),
        (vectors,),
        f"scipy {scipy.__version__} Rotation.from_rotvec",
    )
    yield Case(
        "rotation by nothing", technique.rotation, lambda v: torch.eye(3)[None], (torch.zeros(1, 3),), "identity"
    )
    shifts = torch.randn(4, 3)
    yield Case(
        "motion and its inverse",
        lambda v, t: technique.motion_matrix(v, t, inverse=True) @ technique.motion_matrix(v, t),
        lambda v, t: torch.eye(4).expand(4, 4, 4),
        (vectors, shifts),
        "identity: x = R^T (R x + t - t)",
    )
    yield Case(
        "disparity to depth",
        technique.disparity_to_depth,
        lambda s: torch.tensor([100.0, 0.1, 1 / 5.005]),
        (torch.tensor([0.0, 1.0, 0.5]),),
        "sec. 3.1, by hand: 1/100 + (10 - 1/100) sigma",
    )

    # By hand: f = 10, centre (4, 2), a pixel at (8, 2) and depth 2 is the point (0.8, 0, 2). Half a unit nearer along z it is
    # seen at 4 + 10 * 0.8 / 1.5; with the camera 0.2 to the right at 4 + 10 * 0.6 / 2.
    camera = torch.tensor([[10.0, 0, 4], [0, 10, 2], [0, 0, 1]])
    nearer, right = torch.eye(4), torch.eye(4)
    nearer[2, 3], right[0, 3] = -0.5, -0.2
    for name, motion, x in (("nearer", nearer, 4 + 8 / 1.5), ("to the right", right, 7.0)):
        yield Case(
            f"a pixel seen from {name}",
            lambda d, m=motion: technique.project(d, camera[None], m[None])[0, 0, 2, 8],
            lambda d, x=x: torch.tensor([x, 2.0]),
            (torch.full((1, 1, 5, 9), 2.0),),
            "computed by hand",
        )

    depth = 1 + 4 * torch.rand(2, 2, 7, 9)
    camera = torch.tensor([[8.0, 0, 4.2], [0, 7.5, 2.7], [0, 0, 1]]).expand(2, 3, 3)
    motion = technique.motion_matrix(0.05 * torch.randn(2, 3), 0.3 * torch.randn(2, 3))
    source = torch.rand(2, 3, 7, 9)

    def slow(depth: Tensor, camera: Tensor, motion: Tensor, source: Tensor) -> Tensor:
        built = [
            [
                slow_read(source[i].numpy(), slow_places(depth[i, s].numpy(), camera[i].numpy(), motion[i].numpy()))
                for s in range(depth.shape[1])
            ]
            for i in range(len(depth))
        ]
        return torch.from_numpy(np.array(built))

    yield Case(
        "view synthesis",
        lambda d, k, m, s: technique.read_at(s, technique.project(d, k, m)),
        slow,
        (depth, camera, motion, source),
        "a loop over pixels in numpy, eq. (2)",
    )


# -- losses --------------------------------------------------------------------------------------------------------------


def plain_ssim(x: Tensor, y: Tensor) -> Tensor:
    """(1 - SSIM) / 2 with averaging windows of 3x3 over images mirrored at the edge, as released."""
    x, y = (F.pad(v, (1, 1, 1, 1), mode="reflect") for v in (x, y))
    mean_x, mean_y = F.avg_pool2d(x, 3, 1), F.avg_pool2d(y, 3, 1)
    var_x = F.avg_pool2d(x**2, 3, 1) - mean_x**2
    var_y = F.avg_pool2d(y**2, 3, 1) - mean_y**2
    cov = F.avg_pool2d(x * y, 3, 1) - mean_x * mean_y
    above = (2 * mean_x * mean_y + 0.01**2) * (2 * cov + 0.03**2)
    below = (mean_x**2 + mean_y**2 + 0.01**2) * (var_x + var_y + 0.03**2)
    return ((1 - above / below) / 2).clamp(0, 1)


def plain_loss(
    disparities: list[Tensor],
    target: Tensor,
    sources: list[Tensor],
    camera: Tensor,
    motions: list[Tensor],
    mask: bool,
    noise: Tensor,
) -> Tensor:
    """The whole loss scale by scale and frame by frame: points in homogeneous coordinates, four-by-four matrices."""
    total = 0.0
    batch, _, height, width = target.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).flatten(1).to(target)
    four = torch.eye(4).to(target).repeat(batch, 1, 1)
    four[:, :3, :3] = camera

    def pe(a: Tensor, b: Tensor) -> Tensor:
        return 0.85 * plain_ssim(a, b).mean(1, True) + 0.15 * (a - b).abs().mean(1, True)

    for s, d in enumerate(disparities):
        depth = 1 / (0.01 + 9.99 * F.interpolate(d, (height, width), mode="bilinear", align_corners=False))
        points = depth.flatten(2) * (torch.linalg.inv(camera) @ pixels)
        points = torch.cat([points, torch.ones_like(points[:, :1])], 1)
        errors = []
        for source, motion in zip(sources, motions, strict=True):
            seen = (four @ motion)[:, :3] @ points
            places = (seen[:, :2] / (seen[:, 2:] + 1e-7)).view(batch, 2, height, width).permute(0, 2, 3, 1)
            grid = torch.stack([places[..., 0] / (width - 1), places[..., 1] / (height - 1)], -1) * 2 - 1
            errors.append(pe(F.grid_sample(source, grid, padding_mode="border", align_corners=True), target))
        if mask:
            errors += [pe(source, target) + 1e-5 * noise[:, s, i, None] for i, source in enumerate(sources)]
        loss = torch.cat(errors, 1).min(1).values.mean()
        normal = d / (d.mean((2, 3), keepdim=True) + 1e-7)
        image = F.avg_pool2d(target, 2**s)
        right = (normal[..., 1:] - normal[..., :-1]).abs() * torch.exp(
            -(image[..., 1:] - image[..., :-1]).abs().mean(1, True)
        )
        down = (normal[:, :, 1:] - normal[:, :, :-1]).abs() * torch.exp(
            -(image[:, :, 1:] - image[:, :, :-1]).abs().mean(1, True)
        )
        total = total + loss + 0.001 / 2**s * (right.mean() + down.mean())
    return total / len(disparities)


def losses() -> Iterator[Case]:
    a, b = torch.rand(2, 3, 9, 12).double(), torch.rand(2, 3, 9, 12).double()
    b[0] = (a[0] + 0.1 * b[0]) / 1.1  # one pair alike, one not
    yield Case(
        "SSIM with its written gradient",
        lambda x: technique.PhotometricError(b)(x),
        lambda x: 0.85 * plain_ssim(x, b).mean(1) + 0.15 * (x - b).abs().mean(1),
        (a,),
        "released formula by average pooling, torch's own gradient",
        gradients=True,
        atol=1e-8,
        note="in double precision",
    )
    torch.manual_seed(3)
    size = (16, 32)
    target, first, second = (
        F.interpolate(torch.rand(2, 3, 4, 8), size, mode="bicubic").clamp(0, 1).double() for _ in range(3)
    )
    disparities = [torch.rand(2, 1, size[0] >> s, size[1] >> s).double() for s in range(4)]
    camera = torch.tensor([[20.0, 0, 15.5], [0, 20, 7.5], [0, 0, 1]]).expand(2, 3, 3).double()
    vectors, shifts = 0.02 * torch.randn(2, 2, 3).double(), 0.03 * torch.randn(2, 2, 3).double()
    torch.manual_seed(5)
    noise = torch.randn(2, 4, 2, *size, dtype=torch.float64)
    for mask in (True, False):

        def ours(d0, d1, d2, d3, v, t, mask=mask):
            torch.manual_seed(5)
            motions = [technique.motion_matrix(v[0], t[0], inverse=True), technique.motion_matrix(v[1], t[1])]
            sources = torch.stack([first, second], 1)
            return technique.view_synthesis_loss(
                [d0, d1, d2, d3], target, sources, camera, motions, auto_mask=mask
            ).loss

        def theirs(d0, d1, d2, d3, v, t, mask=mask):
            forward = [technique.motion_matrix(v[i], t[i]) for i in (0, 1)]
            return plain_loss(
                [d0, d1, d2, d3],
                target,
                [first, second],
                camera,
                [torch.linalg.inv(forward[0]), forward[1]],
                mask,
                noise,
            )

        yield Case(
            f"the loss {'with' if mask else 'without'} the auto-mask, and gradients of depth and motion",
            ours,
            theirs,
            (*disparities, vectors, shifts),
            "sec. 3 scale by scale and frame by frame, in homogeneous coordinates",
            gradients=True,
            atol=1e-8,
            note="in double precision",
        )


def pairs() -> dict[str, Pair]:
    """What `paperzoo bench` measures: no package has the network; torchvision's ResNet with a plain decoder stands in for one."""
    from torchvision.models import resnet18

    def reference() -> nn.Module:
        body = resnet18(weights=None)
        body.fc = nn.Identity()
        return Plain(body, (64, 64, 128, 256, 512))

    return {
        "monodepth2_resnet18": Pair(
            model.monodepth2_resnet18,
            reference,
            lambda batch: (torch.rand(batch, 3, 192, 640),),
            "torchvision:resnet18 and a plain decoder",
            train_batch=4,
        )
    }

"""How Monodepth2 learns: from three frames of a video (or a stereo pair, or both), without any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from paperzoo.engine.models import create
from paperzoo.engine.pictures import tile
from paperzoo.errors import PaperZooError
from paperzoo.papers.depth.monodepth2.technique import (
    PhotometricError,
    ViewSynthesis,
    disparity_to_depth,
    motion_matrix,
    view_synthesis_loss,
)
from paperzoo.tasks import depth
from paperzoo.tasks.depth import Count, DepthRecipe, Frame, NotNegative, Positive, TrainingSamples
from paperzoo.tasks.depth_pictures import enlarged
from paperzoo.tasks.training import make_optimizer


@dataclass(frozen=True)
class Config(depth.Config):
    """The settings of sec. 3.4. `frames` (-1, 1) learns from a video, ("s",) from stereo pairs, (-1, 1, "s") from both."""

    model: str = "monodepth2_resnet18"
    pose_model: str = "monodepth2_pose_resnet18"
    pose_weights: str | None = None
    frames: tuple[Frame, ...] = (-1, 1)
    depth_labels: bool = False
    alignment: depth.Alignment = (
        "median"  # "none" with "s" among the frames: the distance of the cameras gives the scale
    )
    near: Positive = 0.1  # the range of depths that the sigmoid spans, in units of the camera's motion
    far: Positive = 100.0
    smooth_weight: NotNegative = 1e-3
    auto_mask: bool = True
    minimum: bool = True  # of the errors of all source frames; else their average
    image_size: tuple[Count, Count] = (192, 640)
    loss: str = "view synthesis"


class Monodepth2(DepthRecipe):
    """Depth network and motion network learn together from the error of the views that they build."""

    config: Config

    def __init__(self, config: Any, runtime: Any, facts: dict | None = None) -> None:
        if not config.frames:
            raise PaperZooError(
                "frames is empty; Monodepth2 learns from the frames before and after (-1, 1), or from 's'"
            )
        height, width = config.image_size
        if height % 32 or width % 32 or min(height, width) < 64:  # two pixels at stride 32: one cannot be mirrored
            raise PaperZooError(f"image_size is {height} x {width}; both must be multiples of 32, at least 64")
        super().__init__(config, runtime, facts)

    def build_more(self, fresh: bool) -> None:
        self.pose = None
        if any(frame != "s" for frame in self.config.frames):
            pose = create(self.config.pose_model, weights=self.config.pose_weights)
            if fresh and self.config.backbone_weights is not None:
                self.load_backbone(pose)
            self.pose = self.runtime.place(pose)

    def make_optimizer(self) -> torch.optim.Optimizer:
        networks = [self.model] if self.pose is None else [self.model, self.pose]
        return make_optimizer(self.config, nn.ModuleList(networks))

    def to_depth(self, output: Tensor) -> Tensor:
        return disparity_to_depth(output, self.config.near, self.config.far)

    # -- learning ------------------------------------------------------------------------------------------------

    def motions(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """From the image's camera to each other frame's, (B, 4, 4) each; the motion network always sees frames in their order in time."""
        found = []
        for i, frame in enumerate(self.config.frames):
            if frame == "s":
                found.append(batch["stereo"])
                continue
            pair = [batch["image"], batch["frames"][:, i]]
            pair = pair if frame > 0 else pair[::-1]
            axis_angle, translation = self.pose(torch.cat(pair, 1))
            found.append(motion_matrix(axis_angle.float(), translation.float(), inverse=frame < 0))
        return found

    def synthesis(self, batch: dict[str, Tensor]) -> ViewSynthesis:
        """The loss and its parts; networks in training mode give four scales, in eval mode one."""
        output = self.model(batch["image"])
        config = self.config
        disparities = [d.float() for d in (output if isinstance(output, list) else [output])]
        return view_synthesis_loss(
            disparities,
            batch["target"],
            batch["sources"],
            batch["intrinsics"],
            self.motions(batch),
            min_depth=config.near,
            max_depth=config.far,
            smooth_weight=config.smooth_weight,
            auto_mask=config.auto_mask,
            minimum=config.minimum,
        )

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        if self.pose is not None:
            self.pose.train()
        found = self.synthesis(batch)
        return {"loss": found.loss, "photometric": found.photometric, "smoothness": found.smooth, "kept": found.kept}

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The task's metrics; of data without depth the photometric error of held-out frames, and that of taking a frame as it is."""
        metrics = super().evaluate(split)
        if metrics:
            return metrics
        total = torch.zeros(3, dtype=torch.float64, device=self.runtime.device)
        data = TrainingSamples(self.open(split, learning=True), self.config)
        self.model.eval()
        if self.pose is not None:
            self.pose.eval()
        for batch in self.runtime.loader(data, self.config.batch_size, self.config.workers):
            views, error = self.synthesis(batch).views, PhotometricError(batch["target"])
            for k, images in enumerate((views, batch["sources"])):
                total[k] += torch.stack([error(v) for v in images.unbind(1)]).amin(0).mean((1, 2)).double().sum()
            total[2] += len(views)
        total = self.runtime.mean(total)
        if total[2] == 0:
            return {}
        return {"reprojection_error": float(total[0] / total[2]), "still_error": float(total[1] / total[2])}

    # -- use -----------------------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Image.Image]:
        """The task's pictures; and what learning sees: the image, a frame after or beside it, the image built from that frame, the auto-mask."""
        return super().figures() | {
            "Held-out frames: image, other frame, image built from it, pixels that teach": self.views()
        }

    @torch.inference_mode()
    def views(self) -> Image.Image:
        data = TrainingSamples(self.open("test", learning=True), self.config)
        rows = range(0, len(data), max(1, len(data) // 6))[:6]
        torch.manual_seed(0)
        batch = torch.utils.data.default_collate([data[i] for i in rows])
        batch = self.runtime.to_device(batch)
        self.model.eval()
        if self.pose is not None:
            self.pose.eval()
        found, pictures = self.synthesis(batch), []
        for i in range(len(rows)):
            mask = found.mask[i].float().expand(3, -1, -1)
            for image in (batch["target"][i], batch["sources"][i, -1], found.views[i, -1], mask):
                pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
                pictures.append(enlarged(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
        return tile(pictures, 4)


RECIPE = Monodepth2

PRESETS = {
    # From scratch on small images, where the paper starts from ImageNet's weights: hence narrow networks and a larger rate.
    "embedded": Config(
        model="monodepth2_slim",
        pose_model="monodepth2_pose_slim",
        data="traced_scenes",
        image_size=(64, 96),
        near=0.01,
        far=10.0,
        max_depth=20.0,
        flip=0.0,
        steps=120,
        batch_size=4,
        learning_rate=1e-3,
        schedule="step",
        milestones=(0.75,),
    ),
    # Sec. 3.4 and 4: Zhou's subset of the Eigen split (39,810 triplets), 20 epochs of batches of 12, Adam at 1e-4, a tenth after 15
    # epochs, mirrored images and colour jitter half of the time each. The paper starts both networks from ImageNet: --backbone-weights.
    "published": Config(
        data="kitti",
        max_depth=80.0,
        crop="garg",
        colour_jitter=0.5,
        steps=20 * (39_810 // 12),
        batch_size=12,
        schedule="step",
        milestones=(0.75,),
        workers=12,
    ),
}

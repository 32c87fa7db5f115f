"""Radiance fields: a scene from pictures with known cameras, rendered from other viewpoints. A network is one scene.

A batch is a dict:
    rays      float32 (N, 12), see `paperzoo.blocks.rays`: origin, direction, viewing direction, near, far, radius
    colours   float32 (N, 3) in [0, 1], RGB: what the pixels of the rays show, over white or black where the picture is not opaque

A network maps rays to what they see. In eval: float32 (N, 5), red, green and blue in [0, 1], the expected depth (the sum of weight times depth,
not divided by the opacity) and the opacity in [0, 1]; every ray alone, so that any number may be rendered at a time. In training: a dict with
`colours` (L, N, 3), what L stages of the network see, the final one last, and whatever else its recipe's `loss` takes (weights, distances,
several passes). How it samples, marches or integrates is its own business: points and viewing directions, cones (the radius), voxels, or
integrals learned in closed form. Every network of the task takes `white_background`. Random numbers come from torch's global generator.

Metrics are means over the held-out pictures, as the field has them: PSNR in dB at a peak of 1, SSIM with a Gaussian window of 11 inside the picture, and
LPIPS (VGG) where `lpips_weights` is the file of the published metric. A prediction is a `RenderedViews`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from paperzoo.blocks.rays import Cameras, along, moved, path_of
from paperzoo.data.cameras import Views, checked_pose, intrinsics_of, open_views, over, pose_of, read_json
from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.tasks.radiance_pictures import RenderedViews, as_picture, depth_pictures, drawn
from paperzoo.tasks.restoration import psnr, ssim

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

ORBIT, FILM = "orbit", 40  # an input that asks for a film, and its number of pictures
SHOWN = 200  # pixels that the longer side of a picture in the report has at most
SMALLEST = 11  # pixels: SSIM's window


@dataclass(frozen=True)
class Config:
    """The default recipe: Adam on the mean squared error of all stages, an exponentially falling learning rate."""

    model: str = "nerf"
    model_arguments: dict[str, str | int | float | bool] = field(default_factory=dict)
    data: str = "rendered_objects"
    downscale: Count = 1  # pictures are made so many times smaller
    holdout: Annotated[int, Field(ge=2)] = 8  # every so many-th picture is for testing, where the data does not say
    test_skip: Count = 1  # only every so many-th test picture
    white_background: bool = True  # behind pictures with opacity, and behind the scene; else black
    ndc: bool = True  # forward-facing scenes in normalised device coordinates
    spherify: bool = False  # LLFF's cameras go around something
    near: NotNegative | None = None  # depths between which the scene lies; None for the data's
    far: Positive | None = None
    centre_steps: Annotated[int, Field(ge=0)] = 0  # the first steps see only the middle of the pictures,
    centre_share: Fraction = 0.5  # so much of each side
    stage_weight: NotNegative = 1.0  # of the loss of all stages but the final one
    weights: str | None = None  # start from these weights
    lpips_weights: str | None = None  # the published LPIPS-VGG metric's file, its VGG-16 included
    steps: Count = 200_000
    batch_size: Count = 4096  # rays
    chunk: Count = 4096  # rays that are rendered at a time
    learning_rate: Positive = 5e-4
    final_learning_rate: Positive = 5e-5
    clip: Positive | None = None


class Pixels:
    """All pixels of a scene's pictures on one device, to draw rays from."""

    def __init__(self, views: Views, near: float, far: float, device: torch.device) -> None:
        self.near, self.far, self.ndc = near, far, views.ndc
        self.cameras = on(views.cameras, device)
        channels = max(len(image) for image in views.images)
        flat = [with_channels(image, channels).flatten(1).T for image in views.images]
        self.values = torch.cat(flat).to(device)
        counts = self.cameras.sizes.prod(1)
        self.starts = counts.cumsum(0) - counts

    def __len__(self) -> int:
        return len(self.values)

    def drawn(self, count: int, generator: torch.Generator, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Rays (count, 12) and the values uint8 (C, count) of random pixels, of all pictures alike; with a `share` below 1 of each picture's middle."""
        if share == 1.0:
            chosen = torch.randint(len(self), (count,), generator=generator).to(self.values.device)
            rows = torch.searchsorted(self.starts, chosen, right=True) - 1
            lines, columns = self.places(chosen - self.starts[rows], rows)
        else:
            rows = torch.randint(len(self.cameras), (count,), generator=generator).to(self.values.device)
            sizes = self.cameras.sizes[rows]
            at = torch.rand(count, 2, generator=generator).to(sizes.device)
            lines, columns = ((0.5 + (at - 0.5) * share) * sizes).long().minimum(sizes - 1).unbind(1)
            chosen = self.starts[rows] + lines * sizes[:, 1] + columns
        rays = self.cameras.rays(rows, columns, lines, self.near, self.far, self.ndc)
        return rays, self.values[chosen].T

    def places(self, inside: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        width = self.cameras.sizes[rows, 1]
        return inside.div(width, rounding_mode="floor"), inside % width


def with_channels(image: Tensor, channels: int) -> Tensor:
    if len(image) == channels:
        return image
    return torch.cat([image, torch.full_like(image[:1], 255)])


def on(cameras: Cameras, device: torch.device) -> Cameras:
    lens = None if cameras.distortion is None else cameras.distortion.to(device)
    return Cameras(cameras.poses.to(device), cameras.intrinsics.to(device), cameras.sizes.to(device), lens)


def smaller(cameras: Cameras, longest: int) -> Cameras:
    """Cameras whose pictures have at most so many pixels along the longer side."""
    factor = min(1.0, longest / int(cameras.sizes.max()))
    sizes = (cameras.sizes * factor).round().long().clamp(min=1)
    scale = (sizes / cameras.sizes).flip(1)
    centre = (cameras.intrinsics[:, 2:] + 0.5) * scale - 0.5
    return replace(cameras, sizes=sizes, intrinsics=torch.cat([cameras.intrinsics[:, :2] * scale, centre], 1))


class RadianceFieldRecipe(Recipe):
    """The task's default recipe. Papers override `build`, `loss` or `step`."""

    config: Config
    monitor = ("psnr", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if facts is None:
            self.facts = self.learn_facts()
        self.model = runtime.place(self.build())
        # paper (sec. 5.3): the defaults of Adam but for eps, 1e-7
        self.optimizer = torch.optim.Adam(self.model.parameters(), config.learning_rate, eps=1e-7)
        ratio = config.final_learning_rate / config.learning_rate
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: ratio ** (step / config.steps))

    def build(self) -> nn.Module:
        config = self.config
        arguments = {"white_background": config.white_background, **config.model_arguments}
        return create(config.model, weights=config.weights, **arguments)

    # -- data ----------------------------------------------------------------------------------------------------

    def open(self, split: str) -> Views:
        c = self.config
        return open_views(c.data, split, c.downscale, c.holdout, c.test_skip, c.ndc, c.spherify)

    def learn_facts(self) -> dict[str, Any]:
        """What rendering needs of a scene: a camera, the depths, the film's path, and where the data's coordinates lie."""
        views, config = self.open("train"), self.config
        near = views.near if config.near is None else config.near
        far = views.far if config.far is None else config.far
        if near >= far:
            raise PaperZooError(f"near is {near:g}; it must be below far, {far:g}")
        self.train_pixels = Pixels(views, near, far, self.runtime.device)
        return {
            "intrinsics": views.cameras.intrinsics[0].tolist(),
            "size": views.cameras.sizes[0].tolist(),
            "near": near,
            "far": far,
            "ndc": views.ndc,
            "path": path_of(views.cameras.poses, views.bounds, views.forward),
            "similarity": views.similarity.tolist(),
        }

    @cached_property
    def train_pixels(self) -> Pixels:
        return Pixels(self.open("train"), self.facts["near"], self.facts["far"], self.runtime.device)

    @cached_property
    def test_views(self) -> Views:
        return self.open("test")

    def batch(self) -> dict[str, Tensor]:
        config, runtime = self.config, self.runtime
        share = config.centre_share if runtime.step < config.centre_steps else 1.0
        count = runtime.share(config.batch_size)
        rays, values = self.train_pixels.drawn(count, runtime.rng("rays"), share)
        return {"rays": rays, "colours": over(values, config.white_background).T}

    # -- learning ------------------------------------------------------------------------------------------------

    def loss(self, output: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """The mean squared errors of all stages (NeRF, eq. 6), those before the final one weighted."""
        errors = (output["colours"].float() - batch["colours"]).square().mean((1, 2))
        return errors[-1] + self.config.stage_weight * errors[:-1].sum()

    def step(self, batch: dict[str, Tensor]) -> dict:
        self.model.train()
        output = self.model(batch["rays"])
        error = (output["colours"][-1].detach().float() - batch["colours"]).square().mean()
        return {"loss": self.loss(output, batch), "train_psnr": -10 * error.log10()}

    # -- rendering -----------------------------------------------------------------------------------------------

    def render(self, cameras: Cameras) -> RenderedViews:
        """Every pixel of every camera, `chunk` rays at a time. The cameras have one size."""
        model, facts = self.deployed.eval(), self.facts
        cameras = on(cameras, self.runtime.device)
        height, width = cameras.sizes[0].tolist()
        images, depths, opacities = [], [], []
        for row in range(len(cameras)):
            rays = cameras.all_rays(row, facts["near"], facts["far"], facts["ndc"])
            seen = torch.cat([model(part).float() for part in rays.split(self.config.chunk)]).view(height, width, 5)
            opacity = seen[..., 4]
            depth = seen[..., 3] / opacity.clamp(min=1e-6)
            if facts["ndc"]:  # the new ray's depth t is 1 - 1 / depth in the scene's units
                depth = 1 / (1 - depth).clamp(min=1e-4)
            images.append((seen[..., :3].clamp(0, 1).permute(2, 0, 1) * 255).round().to(torch.uint8).cpu())
            depths.append(torch.where(opacity < 0.5, 0.0, depth).cpu())
            opacities.append(opacity.cpu())
        return RenderedViews(
            torch.stack(images), torch.stack(depths), torch.stack(opacities), len(cameras), height, width
        )

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """PSNR and SSIM (LPIPS) of each picture of a split, averaged; pictures are shared among the ranks."""
        views = self.test_views if split == "test" else self.open(split)
        names = ["psnr", "ssim"] + (["lpips"] if self.config.lpips_weights else [])
        totals = torch.zeros(len(names), dtype=torch.float64)
        for row in range(self.runtime.rank, len(views), self.runtime.world):
            if min(views.images[row].shape[1:]) < SMALLEST:
                raise PaperZooError(
                    f"{views.names[row]}: SSIM needs pictures of {SMALLEST} pixels or more along each side"
                )
            truth = views.picture(row, self.config.white_background)[None]
            found = self.render(views.cameras[row : row + 1]).images.float() / 255
            values = [psnr(found, truth), ssim(found, truth)]
            if self.config.lpips_weights:
                values.append(float(self.lpips(found.to(self.runtime.device), truth.to(self.runtime.device))))
            totals += torch.tensor(values, dtype=torch.float64)
        means = self.runtime.mean(totals * self.runtime.world / len(views))
        return dict(zip(names, means.tolist(), strict=True))

    @cached_property
    def lpips(self) -> Any:
        return perceptual_distance(self.config.lpips_weights, self.runtime.device)

    # -- use -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, inputs: list) -> list[RenderedViews]:
        """Renders what each input asks for:

        - "orbit", or "orbit:90" for so many pictures: a film around the scene (of a forward-facing one, a winding path before it);
        - a .json file of cameras, as transforms.json: `frames` with a `transform_matrix` each; size and focal length as there, else the data's;
        - a pose (3, 4) or (4, 4), or several (V, 3, 4): camera to world, in the data's coordinates, looking along -z.
        """
        return [self.render(self.cameras_for(value)) for value in inputs]

    def cameras_for(self, value: Any) -> Cameras:
        if isinstance(value, str) and value.split(":")[0] == ORBIT:
            count = value.partition(":")[2] or str(FILM)
            if not count.isdigit() or not 1 <= int(count) <= 10_000:
                raise PaperZooError(f"'{value}': the number of pictures must be 1 to 10000, as in {ORBIT}:90")
            return self.own_cameras(along(self.facts["path"], int(count)))
        if isinstance(value, str | Path):
            path = Path(value).expanduser()
            if path.suffix != ".json":
                raise PaperZooError(
                    f"'{value}' is neither '{ORBIT}' nor a .json file of cameras, nor a pose of 3 x 4 numbers"
                )
            return self.cameras_in(path)
        try:
            poses = torch.as_tensor(np.asarray(value, dtype=np.float64))
        except (TypeError, ValueError):
            raise PaperZooError("a pose must be 3 x 4 or 4 x 4 numbers, camera to world") from None
        poses = poses[None] if poses.ndim == 2 else poses
        if poses.ndim != 3 or not len(poses):
            raise PaperZooError(f"poses have shape {tuple(poses.shape)}; it must be (3, 4), (4, 4) or (V, 3, 4)")
        return self.placed(torch.stack([checked_pose(pose, f"pose {i}") for i, pose in enumerate(poses)]))

    def placed(self, poses: Tensor) -> Cameras:
        """Cameras from poses in the data's coordinates."""
        similarity = torch.tensor(self.facts["similarity"], dtype=torch.float64)
        return self.own_cameras(moved(poses, similarity).float())

    def own_cameras(self, poses: Tensor) -> Cameras:
        """The data's camera at poses float32 (V, 3, 4) in the scene's coordinates."""
        intrinsics, size = torch.tensor([self.facts["intrinsics"]]), torch.tensor([self.facts["size"]])
        return Cameras(poses, intrinsics.expand(len(poses), 4), size.expand(len(poses), 2))

    def cameras_in(self, path: Path) -> Cameras:
        values = read_json(path)
        poses = torch.stack([pose_of(frame, f"{path}: frame {i}") for i, frame in enumerate(values["frames"])])
        cameras = self.placed(poses)
        if not {"fl_x", "camera_angle_x"} & values.keys():
            return cameras
        height, width = (int(values.get(key, own)) for key, own in zip("hw", self.facts["size"], strict=True))
        if min(height, width) < 1:
            raise PaperZooError(f"{path}: w and h are {width} and {height}; they must be 1 or more")
        found, _ = intrinsics_of(values, str(path), width, height, middles=True)
        sizes = torch.tensor([[height, width]]).expand(len(poses), 2)
        return replace(cameras, intrinsics=torch.tensor([found]).expand(len(poses), 4), sizes=sizes)

    def samples(self, folder: Path) -> list[str]:
        """Held-out viewpoints as files of cameras, and a film."""
        cameras, size = self.test_views.cameras, self.facts["size"]
        back = torch.tensor(self.facts["similarity"], dtype=torch.float64).inverse()
        poses = moved(cameras.poses.double(), back)
        paths = []
        for row in range(0, len(cameras), max(1, len(cameras) // 3))[:3]:
            fx, fy, cx, cy = cameras.intrinsics[row].tolist()
            matrix = [*poses[row].tolist(), [0.0, 0.0, 0.0, 1.0]]
            height, width = cameras.sizes[row].tolist() if len(cameras) else size
            camera = {"w": width, "h": height, "fl_x": fx, "fl_y": fy, "cx": cx + 0.5, "cy": cy + 0.5}
            paths.append(str(folder / f"view_{row:03d}.json"))
            text = json.dumps({**camera, "frames": [{"transform_matrix": matrix}]}, indent=1)
            Path(paths[-1]).write_text(text + "\n", encoding="utf-8")
        return [*paths, f"{ORBIT}:12"]

    def example(self) -> tuple[Tensor]:
        """Two rays near the middle of the film's first picture."""
        camera = self.own_cameras(along(self.facts["path"], 8)[:1])
        height, width = self.facts["size"]
        rows = torch.zeros(2, dtype=torch.int64)
        columns, lines = torch.tensor([width // 2, width // 3]), torch.tensor([height // 2, 2 * height // 3])
        return (camera.rays(rows, columns, lines, self.facts["near"], self.facts["far"], self.facts["ndc"]),)

    def draw(self, value: Any, result: RenderedViews) -> Image.Image:
        return drawn(result)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """Held-out pictures, their renderings and depth; pictures along the film's path."""
        from paperzoo.engine.pictures import tile
        from paperzoo.tasks.depth_pictures import enlarged

        views, held_out = self.test_views, []
        for row in range(0, len(views), max(1, len(views) // 4))[:4]:
            camera = smaller(views.cameras[row : row + 1], SHOWN)
            found = self.render(camera)
            truth = (views.picture(row, self.config.white_background) * 255).round().to(torch.uint8)
            truth = as_picture(truth).resize((found.width, found.height), Image.Resampling.BOX)
            shown = [truth, as_picture(found.images[0]), *depth_pictures(found.depth)]
            held_out += [enlarged(picture) for picture in shown]
        film = self.render(smaller(self.own_cameras(along(self.facts["path"], 8)), SHOWN))
        shown = [enlarged(as_picture(image)) for image in film.images]
        shown += [enlarged(picture) for picture in depth_pictures(film.depth)]
        return {
            "Held-out views: picture, rendering, depth": tile(held_out, 6),
            "Along the film's path: rendering, depth": tile(shown, 8),
        }


def perceptual_distance(path: str, device: torch.device) -> Any:
    """LPIPS (Zhang et al. 2018) on VGG-16: a function of two batches in [0, 1]. `path`: a state_dict of the published metric, its network included.

    Raises:
        PaperZooError: if the file does not fit.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    from paperzoo.engine.weights import misfit, read_state

    metric = _LPIPS(pretrained=False, net="vgg", pnet_rand=True, eval_mode=True)
    state = read_state(Path(path).expanduser())
    problem = misfit(metric, state)
    if problem:
        raise PaperZooError(f"{path}: not the weights of LPIPS on VGG-16: {problem}")
    metric.load_state_dict(state)
    metric = metric.to(device)
    return lambda found, truth: metric(2 * found - 1, 2 * truth - 1).mean()


__all__ = ["Config", "Pixels", "RadianceFieldRecipe", "RenderedViews"]

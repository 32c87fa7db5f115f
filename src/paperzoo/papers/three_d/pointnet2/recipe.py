"""PointNet++ learns by the task's default recipe; here are its settings, and pictures of what its levels choose."""

from __future__ import annotations

import torch
from PIL import Image

from paperzoo.blocks.point_sampling import ball_query, farthest_point_sampling, gather_points
from paperzoo.papers.three_d.pointnet2.model import MultiScaleSetAbstraction
from paperzoo.tasks.point_clouds import Config, PointCloudRecipe
from paperzoo.tasks.point_pictures import captioned, cloud_picture, coloured


class PointNet2Recipe(PointCloudRecipe):
    """The default recipe."""

    def figures(self) -> dict[str, Image.Image]:
        """The task's, and the centres and balls of the first two levels on three test clouds."""
        return super().figures() | {"Levels: centres, and the balls around one of them": self.level_picture()}

    @torch.inference_mode()
    def level_picture(self) -> Image.Image:
        """Centres are blue, the points of each ball around one centre another colour, all others grey."""
        from paperzoo.engine.pictures import tile

        pictures, size = [], len(self.test_clouds)
        for i in range(0, size, max(1, size // 3))[:3]:
            cloud, _ = self.test_clouds[i]
            points = self.one_view(cloud)["points"][None, :, :3]
            for name in ("sa1", "sa2"):
                level = self.deployed.get_submodule(name)
                centres = farthest_point_sampling(points, level.centres)
                middle = gather_points(points, centres[:, -1:])
                several = isinstance(level, MultiScaleSetAbstraction)
                radii, sizes = (level.radii, level.group_sizes) if several else ([level.radius], [level.group_size])
                labels = torch.full((points.shape[1],), -1)
                for k in reversed(range(len(radii))):  # small balls over large ones
                    labels[ball_query(points, middle, radii[k], sizes[k]).flatten()] = k + 1
                labels[centres[0]] = 0
                shown = cloud_picture(points[0], coloured(labels), self.config.up, 176)
                pictures.append(captioned(shown, f"{name}: {level.centres} of {points.shape[1]} points"))
                points = gather_points(points, centres)
        return tile(pictures, 6)


RECIPE = PointNet2Recipe

# the released code: Adam from 0.001, times 0.7 every 200,000 clouds, batch norm's decay from 0.5 to 0.99; ModelNet40 has 9,843 clouds
MODELNET_EPOCH, PART_EPOCH, ROOM_EPOCH = 616, 438, 300

PRESETS = {
    "embedded": Config(
        model="pointnet2_part_seg_small",
        task="parts",
        data="solid_parts",
        model_arguments={"drop_rate": 0.0},
        num_points=256,
        features=("normals",),
        rotate="any",
        jitter=0.0,
        steps=240,
        batch_size=16,
        learning_rate=0.01,
    ),
    "published": Config(
        model="pointnet2_cls_ssg",
        data="modelnet40",
        num_points=1024,
        up="z",  # of the OFF files
        rotate="up",
        scale=(0.8, 1.25),
        shift=0.1,
        jitter=0.01,
        steps=251 * MODELNET_EPOCH,
        batch_size=16,
        learning_rate=0.001,
        schedule="staircase",
        decay_steps=200_000 // 16,
        decay_factor=0.7,
        norm_momentum=0.5,
        workers=8,
    ),
    # several scales, and random input dropout (sec. 3.3): up to 87.5% of the points are left out
    "multi_scale": Config(
        model="pointnet2_cls_msg",
        data="modelnet40",
        num_points=1024,
        up="z",
        rotate="up",
        scale=(0.8, 1.25),
        shift=0.1,
        jitter=0.01,
        drop=0.875,
        steps=251 * MODELNET_EPOCH,
        batch_size=16,
        learning_rate=0.001,
        schedule="staircase",
        decay_steps=200_000 // 16,
        decay_factor=0.7,
        norm_momentum=0.5,
        workers=8,
    ),
    "parts": Config(
        model="pointnet2_part_seg_msg",
        task="parts",
        data="shapenet_part",
        num_points=2048,
        features=("normals",),
        up="y",
        rotate="none",
        jitter=0.01,
        steps=201 * PART_EPOCH,
        batch_size=32,
        learning_rate=0.001,
        schedule="staircase",
        decay_steps=200_000 // 32,
        decay_factor=0.7,
        norm_momentum=0.5,
        workers=8,
    ),
    "scenes": Config(
        model="pointnet2_sem_seg",
        task="scenes",
        data="s3dis",
        num_points=4096,
        features=("colours", "place"),
        normalise="none",
        rotate="up",
        jitter=0.0,
        steps=200 * ROOM_EPOCH,
        batch_size=16,
        learning_rate=0.001,
        schedule="staircase",
        decay_steps=200_000 // 16,
        decay_factor=0.7,
        norm_momentum=0.5,
        workers=4,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config"]

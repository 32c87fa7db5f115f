"""The parts of DQN that others build on: replay memory, Q-learning targets, and the frames an Atari agent sees.

Mnih et al., "Playing Atari with Deep Reinforcement Learning", 2013 (arXiv 1312.5602).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class Minibatch(NamedTuple):
    """Transitions: observations and next observations (B, *shape), actions int64 (B,), rewards (B,), terminated (B,)."""

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    next_observations: Tensor
    terminated: Tensor


class ReplayMemory(nn.Module):
    """The latest `capacity` frames of every world in a ring, from which transitions are drawn (section 4, algorithm 1).

    Each frame is stored once: an observation of `stack` frames and its successor are put together when drawn, so a million
    Atari frames take 7 GB rather than 56. All is in buffers, so a checkpoint holds the memory as it is.

    Args:
        capacity: frames of each world; an episode of n steps takes n + 1.
        frame_shape, dtype: of one frame.
        stack: frames in an observation; before an episode's start, its first frame is repeated.
        worlds: how many environments are played side by side, each with a ring of its own.
    """

    def __init__(
        self,
        capacity: int,
        frame_shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        stack: int = 1,
        worlds: int = 1,
    ) -> None:
        super().__init__()
        if capacity < stack + 3:
            raise ValueError(
                f"capacity is {capacity}; it must be at least {stack + 3} for observations of {stack} frames"
            )
        self.capacity, self.stack, self.worlds = capacity, stack, worlds
        size = (worlds, capacity)
        self.register_buffer("frames", torch.zeros(*size, *frame_shape, dtype=dtype))
        self.register_buffer("actions", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("rewards", torch.zeros(size))
        self.register_buffer("terminated", torch.zeros(size, dtype=torch.bool))
        self.register_buffer("usable", torch.zeros(size, dtype=torch.bool))  # has a successor and all of its stack
        self.register_buffer("age", torch.zeros(size, dtype=torch.int64))  # frames since the episode began
        self.register_buffer("head", torch.zeros(worlds, dtype=torch.int64))  # where each world's next frame goes
        self.register_buffer(
            "written", torch.zeros((), dtype=torch.int64)
        )  # places in use, the same bound for all worlds

    def __len__(self) -> int:
        """Transitions that can be drawn."""
        return int(self.usable.sum())

    def add(
        self, frames: Tensor, actions: Tensor, rewards: Tensor, terminated: Tensor, next_frames: Tensor, ended: Tensor
    ) -> None:
        """Store a transition of every world: the frames before (worlds, *frame_shape), what was done and earned (worlds,),
        whether nothing can follow, the frames after, and whether the episodes ended."""
        world = torch.arange(self.worlds)
        here, after = self.head, (self.head + 1) % self.capacity
        self.frames[world, here], self.frames[world, after] = frames, next_frames
        self.actions[world, here], self.rewards[world, here] = actions, rewards
        self.terminated[world, here] = terminated
        self.age[world, after] = self.age[world, here] + 1
        # the last frame of an episode is kept, as a successor only: the next episode begins one place further on
        head = (after + ended.long()) % self.capacity
        self.age[world, head] = torch.where(ended, 0, self.age[world, head])
        # what was written over is gone, and so is every older stack that reaches back to it
        reach = torch.arange(1, self.stack + 2)
        self.usable[world[:, None], (here[:, None] + reach) % self.capacity] = False
        self.usable[world, here] = True
        self.written.copy_(torch.clamp(torch.maximum(self.written, here.max() + 1), max=self.capacity))
        self.head.copy_(head)

    def sample(self, batch_size: int, generator: torch.Generator) -> Minibatch:
        """`batch_size` transitions, uniformly and with replacement. Needs at least one."""
        world, place = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
        while len(place) < batch_size:  # most places are usable, so a few draws more than needed are enough
            more = batch_size + batch_size // 4 + 8
            w = torch.randint(self.worlds, (more,), generator=generator)
            p = torch.randint(int(self.written), (more,), generator=generator)
            found = self.usable[w, p]
            world, place = torch.cat([world, w[found]]), torch.cat([place, p[found]])
        world, place = world[:batch_size], place[:batch_size]
        return Minibatch(
            self.observation(world, place),
            self.actions[world, place],
            self.rewards[world, place],
            self.observation(world, (place + 1) % self.capacity),
            self.terminated[world, place],
        )

    def observation(self, world: Tensor, place: Tensor) -> Tensor:
        """The observations that end at these frames: (B, *frame_shape), or (B, stack, *frame_shape)."""
        if self.stack == 1:
            return self.frames[world, place]
        back = torch.arange(self.stack - 1, -1, -1)
        steps = torch.minimum(back[None], self.age[world, place][:, None])
        return self.frames[world[:, None], (place[:, None] - steps) % self.capacity]


def q_targets(rewards: Tensor, terminated: Tensor, next_values: Tensor, discount: float) -> Tensor:
    """y = r for terminal transitions, else r + discount * max_a Q(next, a); equation 3. (B,), (B,), (B, A) -> (B,)."""
    return rewards + discount * next_values.max(1).values * (~terminated).to(rewards.dtype)


def atari_frame(screen: np.ndarray) -> np.ndarray:
    """A screen (210, 160, 3) uint8 as the agent sees it: grey, 110 x 84, the lower 84 x 84 without the score (section 4.1)."""
    grey = torch.from_numpy(np.ascontiguousarray(screen)).float() @ torch.tensor([0.299, 0.587, 0.114])
    small = nn.functional.interpolate(
        grey[None, None], size=(110, 84), mode="bilinear", antialias=True, align_corners=False
    )
    return small[0, 0, 18:102].round().clamp(0, 255).to(torch.uint8).numpy()

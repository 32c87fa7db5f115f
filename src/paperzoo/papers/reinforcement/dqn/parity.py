"""DQN against stable-baselines3 (networks, and one whole learning step), a deque, and loops over single numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor, nn

from paperzoo.engine.parity import Case
from paperzoo.papers.reinforcement.dqn.model import dqn_atari, dqn_mlp, dqn_nature
from paperzoo.papers.reinforcement.dqn.technique import Minibatch, ReplayMemory, atari_frame, q_targets


def cases() -> Iterator[Case]:
    torch.manual_seed(0)
    yield from networks()
    yield Case(
        "Q-learning targets",
        lambda r, t, q: q_targets(r, t, q, 0.97),
        slow_targets,
        (torch.randn(9), torch.rand(9) < 0.4, torch.randn(9, 5)),
        "equation 3, slow loop",
        gradients=False,
    )
    yield Case(
        "one learning step: loss, clipped gradient, Adam",
        our_step,
        their_step,
        (minibatch(32),),
        f"stable-baselines3 {version('stable-baselines3')} DQN.train",
        rtol=1e-5,
        atol=1e-6,
        note="target network, Huber loss, gradient norm clipped at 10, discount 0.99",
    )
    for stack, capacity in ((1, 12), (1, 200), (4, 16), (4, 40), (3, 300)):
        yield Case(
            f"replay memory, stacks of {stack}, room for {capacity}",
            lambda s=stack, c=capacity: ring_contents(s, c),
            lambda s=stack, c=capacity: deque_contents(s, c),
            (),
            "a deque of whole episodes, observations stacked when stored",
            rtol=0.0,
            atol=0.0,
        )
    yield Case(
        "a screen as the agent sees it: areas of constant grey stay where they are",
        lambda: torch.from_numpy(atari_frame(stripes())).float()[[0, 20, 60, 83], 40],
        lambda: torch.tensor([50.0, 50.0, 200.0, 200.0]),
        (),
        "section 4.1: 210 x 160 to 110 x 84, cropped to 84 x 84; rows 18 to 101 of 110 are rows 35 to 194 of 210",
        atol=1.0,
    )


def networks() -> Iterator[Case]:
    from gymnasium import spaces
    from stable_baselines3.common.torch_layers import FlattenExtractor, NatureCNN
    from stable_baselines3.dqn.policies import QNetwork

    name = f"stable-baselines3 {version('stable-baselines3')}"
    ours = dqn_nature(num_actions=6)
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    theirs = QNetwork(space, spaces.Discrete(6), NatureCNN(space, 512), 512, net_arch=[])
    copy_linears(ours, theirs)
    frames = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    yield Case("dqn_nature", Shared(ours), Shared(theirs), (frames,), f"{name} QNetwork with NatureCNN", gradients=True)

    vector = spaces.Box(-1, 1, (4,), np.float32)
    ours = dqn_mlp(num_actions=2, hidden=(64, 64))
    theirs = QNetwork(vector, spaces.Discrete(2), FlattenExtractor(vector), 4, net_arch=[64, 64])
    copy_linears(ours, theirs)
    yield Case("dqn_mlp", Shared(ours), Shared(theirs), (torch.randn(5, 4),), f"{name} QNetwork", gradients=True)

    ours = dqn_atari(num_actions=4)
    plain = nn.Sequential(
        nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 9 * 9, 256), nn.ReLU(), nn.Linear(256, 4),
    )  # fmt: skip
    copy_linears(ours, plain)
    frames = torch.rand(2, 4, 84, 84) * 255
    scaled = nn.Sequential(Divide(), plain)
    yield Case(
        "dqn_atari", Shared(ours), Shared(scaled), (frames,), "section 4.1, written as a list of layers", gradients=True
    )


class Shared(nn.Module):
    """A network whose parameters are named by their order, so that gradients can be compared one by one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.parameters_in_order = nn.ParameterList(network.parameters())
        self.network = [network]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network[0](*inputs)


class Divide(nn.Module):
    def forward(self, frames: Tensor) -> Tensor:
        return frames / 255


def copy_linears(ours: nn.Module, theirs: nn.Module) -> None:
    """Convolutions and linear layers of one network into those of another, in order."""
    kinds = (nn.Conv2d, nn.Linear)
    pairs = zip(
        (m for m in ours.modules() if isinstance(m, kinds)),
        (m for m in theirs.modules() if isinstance(m, kinds)),
        strict=True,
    )
    for a, b in pairs:
        b.load_state_dict(a.state_dict())


def slow_targets(rewards: Tensor, terminated: Tensor, values: Tensor) -> Tensor:
    goals = []
    for j in range(len(rewards)):
        best = max(float(v) for v in values[j])
        goals.append(float(rewards[j]) if terminated[j] else float(rewards[j]) + 0.97 * best)
    return torch.tensor(goals)


def minibatch(size: int) -> Minibatch:
    g = torch.Generator().manual_seed(5)
    return Minibatch(
        torch.randn(size, 4, generator=g),
        torch.randint(2, (size,), generator=g),
        torch.randn(size, generator=g) * 3,
        torch.randn(size, 4, generator=g),
        torch.rand(size, generator=g) < 0.3,
    )


def two_networks() -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return dqn_mlp(hidden=(32, 32)), dqn_mlp(hidden=(32, 32))


def our_step(batch: Minibatch) -> Tensor:
    """The recipe's loss and what the engine does with it."""
    from paperzoo.engine.runtime import Runtime
    from paperzoo.papers.reinforcement.dqn.recipe import DQN, Config

    recipe = DQN(Config(hidden=(32, 32), learning_rate=1e-2, steps=10), Runtime(seed=0))
    model, target = two_networks()
    recipe.model.load_state_dict(model.state_dict())
    recipe.target.load_state_dict(target.state_dict())
    for _ in range(3):
        recipe.runtime.update(recipe.optimizer, recipe.loss(*batch), clip=10.0)
    return torch.cat([p.detach().flatten() for p in recipe.model.parameters()])


def their_step(batch: Minibatch) -> Tensor:
    import stable_baselines3
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    agent = stable_baselines3.DQN(
        "MlpPolicy", "CartPole-v1", learning_rate=1e-2, gamma=0.99, max_grad_norm=10, device="cpu", buffer_size=10,
        policy_kwargs={"net_arch": [32, 32]},
    )  # fmt: skip
    model, target = two_networks()
    copy_linears(model, agent.policy.q_net)
    copy_linears(target, agent.policy.q_net_target)
    samples = ReplayBufferSamples(
        observations=batch.observations,
        actions=batch.actions[:, None],
        next_observations=batch.next_observations,
        dones=batch.terminated[:, None].float(),
        rewards=batch.rewards[:, None],
    )
    agent.replay_buffer.sample = lambda *_, **__: samples
    agent.set_logger(Logger(None, []))
    agent.train(gradient_steps=3, batch_size=len(batch.rewards))
    return torch.cat([p.detach().flatten() for p in agent.policy.q_net.parameters()])


def episodes(seed: int = 7) -> Iterator[tuple[np.ndarray, int, float, bool, np.ndarray, bool]]:
    """Made-up transitions: episodes of different lengths that end or are cut; every frame has a number of its own."""
    rng = np.random.default_rng(seed)
    number = 0
    for length in (5, 1, 9, 3, 14, 2, 7, 11):
        number += 1
        frame = np.full((2,), number, np.float32)
        cut = bool(rng.random() < 0.5)
        for i in range(length):
            number += 1
            after = np.full((2,), number, np.float32)
            last = i == length - 1
            yield frame, int(rng.integers(3)), float(rng.normal()), last and not cut, after, last
            frame = after


def as_row(observation: Tensor, action: int, reward: float, after: Tensor, terminated: bool) -> Tensor:
    return torch.cat(
        [observation.flatten(), torch.tensor([action, reward]), after.flatten(), torch.tensor([float(terminated)])]
    )


def ring_contents(stack: int, capacity: int) -> Tensor:
    """Every transition that can be drawn, in the order of time, after each of the additions: the sum over them."""
    memory = ReplayMemory(capacity, (2,), stack=stack)
    totals = []
    for transition in episodes():
        frame, action, reward, terminated, after, ended = transition
        rest = (torch.tensor([action]), torch.tensor([reward]), torch.tensor([terminated]))
        memory.add(torch.from_numpy(frame)[None], *rest, torch.from_numpy(after)[None], torch.tensor([ended]))
        places = memory.usable[0].nonzero().flatten()
        only = torch.zeros_like(places)
        following = (places + 1) % capacity
        rows = [
            as_row(o, int(memory.actions[0, p]), float(memory.rewards[0, p]), n, bool(memory.terminated[0, p]))
            for p, o, n in zip(
                places, memory.observation(only, places), memory.observation(only, following), strict=True
            )
        ]
        rows.sort(key=lambda row: float(row[2 * stack - 1]))
        totals.append(torch.stack(rows[-recent(capacity, stack) :]).double().sum(0))
        drawn = memory.sample(6, torch.Generator().manual_seed(len(totals)))
        known = {tuple(row.tolist()) for row in rows}
        for parts in zip(*drawn, strict=True):
            o, a, r, n, t = parts
            assert tuple(as_row(o, int(a), float(r), n, bool(t)).tolist()) in known, "drew what is not there"
        assert len(rows) == len(memory)
    return torch.stack(totals)


def recent(capacity: int, stack: int) -> int:
    """How many of the latest transitions a ring surely holds: episode ends and stacks over the head cost places."""
    return max(1, capacity // 2 - 2 * stack) if capacity < 100 else 10**6


def deque_contents(stack: int, capacity: int) -> Tensor:
    kept: deque = deque(maxlen=recent(capacity, stack))
    totals, frames = [], []
    for frame, action, reward, terminated, after, ended in episodes():
        frames = frames or [torch.from_numpy(frame)] * stack
        following = [*frames[1:], torch.from_numpy(after)]
        kept.append(as_row(torch.stack(frames), action, reward, torch.stack(following), terminated))
        frames = [] if ended else following
        totals.append(torch.stack(list(kept)).double().sum(0))
    return torch.stack(totals)


def stripes() -> np.ndarray:
    """A screen that is dark above and bright below, with a score line that must not be seen."""
    screen = np.zeros((210, 160, 3), np.uint8)
    screen[:30] = 255
    screen[30:120] = 50
    screen[120:] = 200
    return screen

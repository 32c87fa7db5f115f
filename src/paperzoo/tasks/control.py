"""Control: which of a few actions, taken now, earns the most reward from here on?

The data is an environment of Gymnasium with discrete actions. An observation is what the environment shows: float32 of
`observation_shape`, or with frames uint8 (stack, H, W), the latest last. A network takes `num_actions` and
`observation_shape` and maps observations (B, *observation_shape) to action values (B, num_actions), in units of discounted
reward. A prediction is a `Decision`. One recipe step is one step (of `frame_skip` frames) in each of `worlds` environments and one
learning step.

Several processes act identically, in environments with the same seeds, and each learns from its share of a minibatch.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor, nn

from paperzoo.engine.models import create
from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import MissingExtra, PaperZooError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
logger = logging.getLogger("paperzoo")


@dataclass(frozen=True)
class Decision:
    """The answer for one observation: the best action, and the value of every action."""

    action: int
    values: list[float]


@dataclass(frozen=True)
class Config:
    """The default recipe: Q-learning from the transition just made, without a memory."""

    model: str = "perceptron"  # a model's name, or the plain network here
    data: str = "CartPole-v1"  # the environment
    hidden: tuple[Count, ...] = (128, 128)  # widths of the plain network
    weights: str | None = None
    steps: Count = 8000
    learning_rate: Positive = 1e-3
    schedule: Literal["constant", "linear"] = "constant"
    discount: Share = 0.99
    clip: Positive | None = None
    epsilon_start: Share = 1.0  # the chance of a random action, falling linearly …
    epsilon_end: Share = 0.05
    epsilon_steps: Count = 2000  # … over so many steps
    frame_skip: Count = 1  # frames that an action is repeated for; their rewards are added
    stack: Count = 1  # frames that an observation holds
    scale: tuple[Positive, ...] | None = None  # what an observation's numbers are divided by before the network
    worlds: Count = 1  # environments that are played side by side
    reward_clip: bool = False  # learn from the sign of rewards
    keep_best_every: Annotated[int, Field(ge=0)] = (
        0  # steps between trials; the best network tried is kept. 0: the last one
    )
    keep_best_episodes: Count = 10  # episodes of a trial
    evaluate_episodes: Count = 20
    evaluate_epsilon: Share = 0.0
    evaluate_steps: Count = 10_000  # an episode is cut there


class Transition(NamedTuple):
    """One step: the frame before, what was done, what it earned, the frame after.

    `terminated`: the task ended, nothing can be earned any more; `ended`: the episode did, by a time limit perhaps.
    """

    frame: np.ndarray
    action: int
    reward: float
    terminated: bool
    next_frame: np.ndarray
    ended: bool


class World:
    """An environment whose every moment can be stored and restored.

    Episode n is reset with a seed that follows from n, so its course is fixed by the actions taken. The state of a world is
    therefore the episode's number and its actions; restoring repeats them. This is exact for every environment that is
    deterministic once seeded: CartPole and its kin, Box2D, the Atari emulator. One that is not is recognised, since the
    observation after the repetition differs: then the episode begins anew with its seed, and the log says so.

    Args:
        name: for `gymnasium.make`, for example "CartPole-v1".
        key: from an episode's number to its seed.
        frame_skip, stack: see `Config`.
        prepare: from what the environment shows to a frame, for example grey and small.

    Raises:
        MissingExtra: without gymnasium. PaperZooError: for an unknown environment, or one without discrete actions.
    """

    def __init__(
        self,
        name: str,
        key: Callable[[int], int],
        frame_skip: int = 1,
        stack: int = 1,
        prepare: Callable[[np.ndarray], np.ndarray] | None = None,
        render: bool = False,
    ) -> None:
        self.name, self.key, self.frame_skip, self.stack = name, key, frame_skip, stack
        self.prepare = prepare or (lambda observation: np.asarray(observation, dtype=np.float32))
        self.environment = make_environment(name, render)
        self.num_actions = int(self.environment.action_space.n)
        self.episode, self.actions, self.total = 0, [], 0.0
        self.returns: list[tuple[int, float]] = []  # (steps so far, return) of every finished episode
        self.steps = 0
        self.begin(0)

    def begin(self, episode: int) -> None:
        """Reset to the start of an episode."""
        self.episode, self.actions, self.total = episode, [], 0.0
        observation, _ = self.environment.reset(seed=self.key(episode) % 2**31)
        self.frames = [self.prepare(observation)] * self.stack

    @property
    def frame(self) -> np.ndarray:
        return self.frames[-1]

    @property
    def observation(self) -> np.ndarray:
        """What the network sees: the frame, or the latest `stack` frames."""
        return self.frames[-1] if self.stack == 1 else np.stack(self.frames)

    def step(self, action: int) -> Transition:
        """Take an action; when the episode ends, begin the next one."""
        before = self.frame
        reward, terminated, truncated = self.advance(action)
        self.steps += 1
        transition = Transition(before, action, reward, terminated, self.frame, terminated or truncated)
        if transition.ended:
            self.returns.append((self.steps, self.total))
            self.begin(self.episode + 1)
        return transition

    def advance(self, action: int) -> tuple[float, bool, bool]:
        """Repeat an action for `frame_skip` frames: (reward, terminated, truncated)."""
        reward, terminated, truncated = 0.0, False, False
        for _ in range(self.frame_skip):
            observation, earned, terminated, truncated, _ = self.environment.step(action)
            reward += float(earned)
            if terminated or truncated:
                break
        self.frames = [*self.frames[1:], self.prepare(observation)]
        self.actions.append(action)
        self.total += reward
        return reward, bool(terminated), bool(truncated)

    def state_dict(self) -> dict[str, Any]:
        return {
            "episode": self.episode,
            "steps": self.steps,
            "actions": torch.tensor(self.actions, dtype=torch.int32),
            "frame": torch.from_numpy(np.array(self.frame)),
            "returns": torch.tensor(self.returns, dtype=torch.float64).reshape(-1, 2),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        self.returns = [(int(step), value) for step, value in state["returns"].tolist()]
        self.begin(int(state["episode"]))
        for action in state["actions"].tolist():
            _, terminated, truncated = self.advance(action)
            if terminated or truncated:
                break
        if len(self.actions) != len(state["actions"]) or not np.array_equal(self.frame, state["frame"].numpy()):
            logger.warning("%s does not repeat its course exactly: episode %d begins anew", self.name, self.episode)
            self.begin(self.episode)


def make_environment(name: str, render: bool = False) -> Any:
    """`gymnasium.make`, with errors that a user can act on."""
    try:
        import gymnasium
    except ImportError:
        raise MissingExtra("gymnasium", "rl", "control") from None
    arguments: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
    if name.startswith("ALE/"):
        try:
            import ale_py
        except ImportError:
            raise PaperZooError(f"data '{name}' needs the package 'ale-py': pip install ale-py") from None
        gymnasium.register_envs(ale_py)
        arguments |= {"frameskip": 1, "repeat_action_probability": 0.0}  # the recipe repeats actions itself
    try:
        environment = gymnasium.make(name, **arguments)
    except gymnasium.error.DependencyNotInstalled as error:
        raise PaperZooError(f"data '{name}': {str(error).splitlines()[0]}") from None
    except gymnasium.error.Error as error:
        raise PaperZooError(f"data '{name}' is no environment of Gymnasium ({str(error).splitlines()[0]})") from None
    if not isinstance(environment.action_space, gymnasium.spaces.Discrete) or environment.action_space.start != 0:
        raise PaperZooError(f"data '{name}': its actions are {environment.action_space}; Discrete(n) is needed")
    if not isinstance(environment.observation_space, gymnasium.spaces.Box):
        raise PaperZooError(f"data '{name}': it shows {environment.observation_space}; a Box (numbers) is needed")
    return environment


def perceptron(num_actions: int, observation_shape: tuple[int, ...], hidden: tuple[int, ...]) -> nn.Sequential:
    """Flatten, then linear layers with ReLU between them. (B, *observation_shape) -> (B, num_actions)."""
    sizes = [math.prod(observation_shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], num_actions))


class Best(nn.Module):
    """The network with the greatest return of all that were offered, of equals the latest; before any, the latest.

    It has the shape of `torch.optim.swa_utils.AveragedModel`, so the engine deploys it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("value", torch.tensor(-math.inf))

    def update_parameters(self, network: nn.Module) -> None:
        """Called by the engine after every step."""
        if float(self.value) == -math.inf:
            self.module.load_state_dict(network.state_dict())

    def offer(self, network: nn.Module, value: float) -> None:
        if value >= float(self.value):
            self.value.fill_(value)
            self.module.load_state_dict(network.state_dict())


class ControlRecipe(Recipe):
    """The task's default recipe. Methods override `learn`, and `prepare` for frames."""

    config: Config
    monitor = ("mean_return", "max")

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        super().__init__(config, runtime, facts)
        if not self.facts:
            self.worlds = [self.make_world(f"train/{i}") for i in range(config.worlds)]  # checkpointed: episodes go on
            first = self.worlds[0]
            self.facts = {"num_actions": first.num_actions, "observation_shape": list(first.observation.shape)}
        self.model = runtime.place(self.build())
        self.average = Best(self.model) if config.keep_best_every else None
        self.optimizer = self.make_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), self.config.learning_rate)

    def factor(self, step: int) -> float:
        """The learning rate of a step, as a factor of the config's."""
        return 1.0 if self.config.schedule == "constant" else max(0.0, 1 - step / self.config.steps)

    def build(self) -> nn.Module:
        shape = tuple(self.facts["observation_shape"])
        if self.config.model == "perceptron":
            return perceptron(self.facts["num_actions"], shape, self.config.hidden)
        arguments = {"num_actions": self.facts["num_actions"], "observation_shape": shape}
        return create(self.config.model, weights=self.config.weights, **arguments, **self.model_arguments())

    def model_arguments(self) -> dict[str, Any]:
        """What the config says to the model's function, besides the environment's sizes."""
        return {}

    # -- acting --------------------------------------------------------------------------------------------------

    def prepare(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """From what the environment shows to a frame; None: as float32."""
        return None

    def make_world(self, stream: str, render: bool = False) -> World:
        config, runtime = self.config, self.runtime
        key = lambda episode: runtime.key("world", stream, episode)  # noqa: E731
        return World(config.data, key, config.frame_skip, config.stack, self.prepare(), render)

    @property
    def epsilon(self) -> float:
        """The chance of a random action at this step."""
        c = self.config
        progress = min(1.0, self.runtime.step / c.epsilon_steps)
        return c.epsilon_start + (c.epsilon_end - c.epsilon_start) * progress

    def values(self, observations: np.ndarray | Tensor, network: nn.Module | None = None) -> Tensor:
        """Action values (B, num_actions) of observations (B, *observation_shape), on the CPU."""
        with torch.no_grad():
            seen = self.seen(torch.as_tensor(observations).to(self.runtime.device))
            return (network or self.deployed)(seen).float().cpu()

    def seen(self, observations: Tensor) -> Tensor:
        """Observations as the network takes them: divided by the config's scale."""
        scale = self.config.scale
        return observations if scale is None else observations / torch.tensor(scale, device=observations.device)

    def act(self) -> list[Transition]:
        """An epsilon-greedy step in every world, the same on every rank."""
        rng = self.runtime.rng("act", per_rank=False)
        count = len(self.worlds)
        explore = torch.rand(count, generator=rng) < self.epsilon
        actions = torch.randint(self.facts["num_actions"], (count,), generator=rng)
        if not bool(explore.all()):
            greedy = self.values(self.observations(), self.model).argmax(1)
            actions = torch.where(explore, actions, greedy)
        return [world.step(action) for world, action in zip(self.worlds, actions.tolist(), strict=True)]

    def observations(self) -> np.ndarray:
        """What the worlds show now: (worlds, *observation_shape)."""
        return np.stack([world.observation for world in self.worlds])

    # -- learning ------------------------------------------------------------------------------------------------

    def step(self, batch: None) -> dict:
        self.model.train()
        if self.average is not None and self.runtime.step and self.runtime.step % self.config.keep_best_every == 0:
            returns = [sum(r) for r in self.play(self.config.keep_best_episodes, "trial", self.model.eval())]
            self.average.offer(self.model.train(), float(np.mean(returns)))
        before = self.observations()
        loss = self.learn(before, self.act())
        values = {"epsilon": self.epsilon}
        latest = [world.returns[-1] for world in self.worlds if world.returns]
        if latest:
            values["episode_return"] = max(latest)[1]  # of the episode that ended last
        return values if loss is None else {"loss": loss, **values}

    def learn(self, before: np.ndarray, transitions: list[Transition]) -> Tensor | None:
        """Q-learning on the transitions just made: the squared difference to r + discount * max Q(next)."""
        device = self.runtime.device
        following = self.values(self.observations(), self.model).max(1).values.tolist()
        rows, goals = [], []
        for i, (transition, value) in enumerate(zip(transitions, following, strict=True)):
            if transition.ended and not transition.terminated:
                continue  # cut by a time limit: what follows was not shown
            rows.append(i)
            goals.append(
                self.learned_reward(transition.reward) + (not transition.terminated) * self.config.discount * value
            )
        if not rows:
            return None
        actions = torch.tensor([transitions[i].action for i in rows], device=device)
        values = self.model(self.seen(torch.as_tensor(before[rows]).to(device))).gather(1, actions[:, None])[:, 0]
        return (values - torch.tensor(goals, device=device)).square().mean()

    def learned_reward(self, reward: float) -> float:
        return float(np.sign(reward)) if self.config.reward_clip else reward

    # -- use -----------------------------------------------------------------------------------------------------

    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The mean, least and greatest return of `evaluate_episodes` episodes played with the network's best actions."""
        returns = [sum(rewards) for rewards in self.play(self.config.evaluate_episodes, split)]
        return {"mean_return": float(np.mean(returns)), "min_return": min(returns), "max_return": max(returns)}

    def play(self, episodes: int, stream: str = "test", network: nn.Module | None = None) -> list[list[float]]:
        """The rewards of some episodes, played side by side; each has a seed of its own."""
        network = network or self.deployed.eval()
        worlds = [self.make_world(f"{stream}/{i}") for i in range(episodes)]
        rewards: list[list[float]] = [[] for _ in worlds]
        rng = torch.Generator().manual_seed(self.runtime.key("play", stream))
        going = list(range(episodes))
        while going:
            best = self.values(np.stack([worlds[i].observation for i in going]), network).argmax(1).tolist()
            ended = []
            for i, action in zip(going, best, strict=True):
                if float(torch.rand((), generator=rng)) < self.config.evaluate_epsilon:
                    action = int(torch.randint(self.facts["num_actions"], (), generator=rng))
                reward, terminated, truncated = worlds[i].advance(action)
                rewards[i].append(reward)
                if terminated or truncated or len(rewards[i]) >= self.config.evaluate_steps:
                    ended.append(i)
            going = [i for i in going if i not in ended]
        for world in worlds:
            world.environment.close()
        return rewards

    def predict(self, inputs: list) -> list[Decision]:
        """Observations (lists or arrays of `observation_shape`) to decisions.

        Raises:
            PaperZooError: for an observation of another shape.
        """
        shape = tuple(self.facts["observation_shape"])
        self.deployed.eval()
        decisions = []
        for value in inputs:
            array = np.asarray(value, dtype=np.float32)
            if array.shape != shape:
                raise PaperZooError(f"an observation of {self.config.data} has the shape {shape}, not {array.shape}")
            values = self.values(array[None])[0]
            decisions.append(Decision(int(values.argmax()), values.tolist()))
        return decisions

    def samples(self, folder: Path) -> list[list]:
        """Observations from the beginning of an episode."""
        world = self.make_world("samples")
        inputs = []
        for i in range(32):
            if i % 8 == 0:
                inputs.append(world.observation.tolist())
            if any(world.advance(int(self.values(world.observation[None]).argmax()))[1:]):
                break
        return inputs

    def example(self) -> tuple[Tensor]:
        shape = tuple(self.facts["observation_shape"])
        return (torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),)

    def draw(self, value: Any, result: Decision) -> Image.Image:
        """The observation, and the value of each action; the best is filled."""
        return beside(show_observation(np.asarray(value, dtype=np.float32), self.config.data), action_bars(result))

    def figures(self) -> dict[str, Image.Image]:
        """The return of every training episode, and scenes of one episode that the network plays."""
        from paperzoo.engine.pictures import curve, tile

        pictures = {}
        returns = sorted(pair for world in getattr(self, "worlds", []) for pair in world.returns)
        if returns:
            values = [value for _, value in returns]
            smooth = [(step, float(np.mean(values[max(0, i - 9) : i + 1]))) for i, (step, _) in enumerate(returns)]
            pictures["Return of training episodes"] = curve({"episode": returns, "mean of ten": smooth}, "return")
        pictures["One episode"] = tile(self.scenes(), 4)
        return pictures

    def scenes(self, count: int = 8, every: int = 12) -> list[Image.Image]:
        """Moments of an episode: the environment's own picture where it can draw, else its state drawn here."""
        try:
            world = self.make_world("scenes", render=True)
            world.environment.render()
        except Exception:  # drawing needs packages (pygame, a display) that often are not there
            world = self.make_world("scenes")
            world.environment.render = lambda: None
        pictures = []
        for i in range(count * every):
            if i % every == 0:
                drawn = world.environment.render()
                frame = Image.fromarray(np.asarray(drawn)) if drawn is not None else None
                pictures.append(
                    frame.resize((240, 160)) if frame else show_observation(world.observation, self.config.data)
                )
            if any(world.advance(int(self.values(world.observation[None]).argmax()))[1:]):
                break
        world.environment.close()
        return pictures


# -- pictures ------------------------------------------------------------------------------------------------------------


def show_observation(observation: np.ndarray, name: str, size: tuple[int, int] = (240, 160)) -> Image.Image:
    """An observation as a picture: the latest frame, CartPole's cart, or a bar for every number."""
    if observation.ndim >= 2:
        frame = observation[-1] if observation.ndim == 3 else observation
        return Image.fromarray(frame.clip(0, 255).astype(np.uint8)).convert("RGB").resize(size)
    picture = Image.new("RGB", size, "white")
    canvas = ImageDraw.Draw(picture)
    width, height = size
    if name.startswith("CartPole"):
        x, _, angle, _ = observation
        cart, ground = width / 2 + float(x) / 2.4 * width / 2, height * 0.75
        tip = (cart + 80 * math.sin(angle), ground - 8 - 80 * math.cos(angle))
        canvas.line([(0, ground + 8), (width, ground + 8)], fill="black")
        canvas.rectangle([cart - 18, ground - 8, cart + 18, ground + 8], fill="black")
        canvas.line([(cart, ground - 8), tip], fill=(200, 140, 80), width=6)
        return picture
    step = width / len(observation)
    for i, number in enumerate(np.tanh(observation)):
        top, bottom = sorted((height / 2, height / 2 * (1 - float(number))))
        canvas.rectangle([i * step + 2, top, (i + 1) * step - 2, bottom], fill=(70, 110, 180))
    return picture


def action_bars(decision: Decision, height: int = 160) -> Image.Image:
    """The value of every action as a bar from the least to the greatest."""
    low, high = min(decision.values), max(decision.values)
    picture = Image.new("RGB", (30 * len(decision.values) + 10, height), "white")
    canvas = ImageDraw.Draw(picture)
    for i, value in enumerate(decision.values):
        share = 0.3 + 0.7 * (value - low) / (high - low) if high > low else 1.0
        box = [i * 30 + 8, height - 16 - share * (height - 40), i * 30 + 30, height - 16]
        canvas.rectangle(box, fill=(70, 110, 180) if i == decision.action else None, outline=(70, 110, 180))
        canvas.text((i * 30 + 12, height - 14), str(i), fill="black")
    return picture


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (left.width + right.width + 6, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 6, 0))
    return sheet

"""Control: worlds that can be stored and restored, replay, frames, resuming a run exactly."""

import dataclasses

import numpy as np
import pytest
import torch

from paperzoo.engine.checkpoint import restore, snapshot
from paperzoo.engine.loop import one_step
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.reinforcement.dqn.recipe import DQN, Config
from paperzoo.papers.reinforcement.dqn.technique import ReplayMemory
from paperzoo.tasks.control import ControlRecipe, Decision, World

gymnasium = pytest.importorskip("gymnasium")
TINY = Config(
    steps=60,
    learn_start=20,
    batch_size=8,
    capacity=64,
    hidden=(16,),
    target_every=10,
    epsilon_steps=30,
    worlds=2,
    keep_best_every=20,
    keep_best_episodes=2,
)


def world(**options) -> World:
    return World("CartPole-v1", lambda episode: 1000 + episode, **options)


def test_a_world_goes_on_where_it_was():
    one, rng = world(), np.random.default_rng(0)
    for _ in range(70):
        one.step(int(rng.integers(2)))
    two = world()
    two.load_state_dict(one.state_dict())
    assert one.episode > 0 and two.returns == one.returns and two.episode == one.episode
    for action in rng.integers(2, size=90).tolist():
        a, b = one.step(action), two.step(action)
        assert np.array_equal(a.next_frame, b.next_frame) and a[1:4] == b[1:4] and a.ended == b.ended


def test_a_world_that_does_not_repeat_begins_its_episode_anew(caplog):
    one = world()
    for action in (0, 1, 0, 1, 0):
        one.step(action)
    state = one.state_dict()
    state["frame"] = state["frame"] + 1
    two = world()
    two.load_state_dict(state)
    assert "begins anew" in caplog.text and two.episode == one.episode and two.actions == []


def test_stacks_repeat_the_first_frame():
    one = world(stack=3)
    first = one.frame
    one.step(1)
    assert one.observation.shape == (3, 4)
    assert np.array_equal(one.observation[0], first) and np.array_equal(one.observation[1], first)


def test_frame_skip_adds_rewards():
    assert world(frame_skip=4).step(0).reward == 4.0


@pytest.mark.parametrize(
    ("name", "said"), [("CartPole-v9", "no environment"), ("Pendulum-v1", "Discrete"), ("FrozenLake-v1", "Box")]
)
def test_environments_that_do_not_fit_are_named(name, said):
    with pytest.raises(PaperZooError, match=said):
        World(name, lambda episode: episode)


def test_memory_draws_only_whole_transitions():
    memory = ReplayMemory(32, (2,), stack=2, worlds=2)
    frames, time = torch.zeros(2, 2), torch.zeros(2)
    for i in range(1, 200):
        time = torch.tensor([float(i), float(1000 + i)])
        after = time[:, None].expand(2, 2)
        ended = torch.tensor([i % 7 == 0, i % 5 == 0])
        memory.add(frames, torch.tensor([i % 3, 0]), time, ended & (i % 2 == 0), after, ended)
        drawn = memory.sample(16, torch.Generator().manual_seed(i))
        # the reward of a transition is its time, and so is its successor's frame
        assert torch.equal(drawn.next_observations[:, -1, 0], drawn.rewards)
        steps = drawn.next_observations[:, -1, 0] - drawn.observations[:, -1, 0]
        assert bool(((steps == 1) | (drawn.observations[:, -1, 0] == 0)).all())
        frames = after
    assert 40 <= len(memory) <= 64


@pytest.mark.parametrize("kind", [DQN, ControlRecipe])
def test_a_run_resumes_bit_for_bit(kind, tmp_path):
    def begun() -> ControlRecipe:
        torch.manual_seed(0)
        return kind(TINY if kind is DQN else dataclasses.replace(TINY, model="perceptron"), Runtime(seed=3))

    one = begun()
    for _ in range(45):
        one_step(one, tmp_path)
    torch.save(snapshot(one), tmp_path / "state.pt")
    two = begun()
    restore(two, torch.load(tmp_path / "state.pt", weights_only=True))
    two.runtime.step = 45
    for _ in range(15):
        a, b = one_step(one, tmp_path), one_step(two, tmp_path)
        assert a.keys() == b.keys() and ("loss" not in a or torch.equal(a["loss"], b["loss"]))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [w.returns for w in one.worlds] == [w.returns for w in two.worlds]


def test_without_a_target_network():
    recipe = DQN(dataclasses.replace(TINY, target_every=0, loss="squared", optimizer="rmsprop"), Runtime(seed=0))
    for _ in range(30):
        values = one_step(recipe, None)
    assert recipe.target is None and torch.isfinite(values["loss"])


def test_predictions_and_pictures():
    recipe = DQN(TINY, Runtime(seed=0))
    for _ in range(40):
        one_step(recipe, None)
    inputs = recipe.samples(None)
    results = recipe.predict(inputs)
    assert len(results) == len(inputs) and isinstance(results[0], Decision) and len(results[0].values) == 2
    assert recipe.draw(inputs[0], results[0]).size[0] > 100
    assert "One episode" in recipe.figures()
    with pytest.raises(PaperZooError, match="shape"):
        recipe.predict([[1.0, 2.0]])


def test_a_saved_network_needs_no_training_world():
    recipe = DQN(TINY, Runtime(seed=0))
    again = DQN(TINY, Runtime(seed=0), recipe.facts)
    assert not hasattr(again, "worlds") and again.evaluate()["mean_return"] > 5


def test_frames_are_learned_from_in_small(monkeypatch):
    """The conv network, stacks, clipped rewards, on an environment that shows small screens."""

    class Screens(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 255, (210, 160, 3), np.uint8)
        action_space = gymnasium.spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.time = 0
            return self.screen(), {}

        def screen(self):
            return self.np_random.integers(0, 255, (210, 160, 3), dtype=np.uint8)

        def step(self, action):
            self.time += 1
            return self.screen(), 7.0, self.time >= 9, False, {}

    monkeypatch.setattr("paperzoo.tasks.control.make_environment", lambda name, render=False: Screens())
    config = dataclasses.replace(
        TINY,
        model="dqn_atari",
        data="screens",
        frames="atari",
        stack=4,
        frame_skip=2,
        reward_clip=True,
        learn_start=3,
        batch_size=2,
        keep_best_every=0,
    )
    recipe = DQN(config, Runtime(seed=0))
    for _ in range(8):
        values = one_step(recipe, None)
    assert torch.isfinite(values["loss"]) and recipe.memory.frames.dtype == torch.uint8
    assert recipe.memory.rewards.max() == 1.0 and recipe.worlds[0].returns[0][1] == 63.0

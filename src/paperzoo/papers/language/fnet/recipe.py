"""FNet learns by two tasks' default recipes: pre-training by masked language modelling, then classification of texts."""

from __future__ import annotations

from paperzoo.engine.recipe import Recipe
from paperzoo.engine.runtime import Runtime
from paperzoo.tasks.masked_language_modelling import Config as PretrainingConfig
from paperzoo.tasks.masked_language_modelling import MaskedLanguageModellingRecipe
from paperzoo.tasks.text_classification import Config, TextClassificationRecipe


def recipe(config: Config | PretrainingConfig, runtime: Runtime, facts: dict | None = None) -> Recipe:
    """The recipe that a preset's settings belong to."""
    kind = MaskedLanguageModellingRecipe if isinstance(config, PretrainingConfig) else TextClassificationRecipe
    return kind(config, runtime, facts)


RECIPE = recipe
PRESETS = {
    # from random weights: which part of Python's library does a docstring come from?
    "embedded": Config(
        model="fnet_base_classifier",
        data="python_docs",
        tokenizer="wordpiece",
        vocab_size=4000,
        max_length=64,
        embed_dim=128,
        depth=2,
        hidden_dim=256,
        drop_rate=0.2,
        steps=500,
        batch_size=32,
        learning_rate=2e-3,  # small and from scratch; fine-tuning wants 1e-5
        warmup_steps=40,
    ),
    "embedded_pretraining": PretrainingConfig(
        model="fnet_base_pretraining",
        data="python_docs",
        tokenizer="wordpiece",
        vocab_size=1500,
        max_length=48,
        embed_dim=128,
        depth=2,
        hidden_dim=256,
        drop_rate=0.0,
        steps=700,
        batch_size=64,
        learning_rate=3e-3,
        warmup_steps=40,
        clip=1.0,
    ),
    # GLUE, here SST-2: sec. 4.1.2 and the released settings; start from google/fnet-base with --weights and --tokenizer
    "published": Config(
        model="fnet_base_classifier",
        data="glue/SST-2",  # a folder with train.tsv and dev.tsv
        tokenizer="unigram",
        vocab_size=32_000,
        max_length=512,
        steps=3 * 67_349 // 64,  # 3 epochs
        batch_size=64,
        learning_rate=1e-5,
        warmup_steps=3 * 67_349 // 640,
        weight_decay=0.01,
        clip=None,
    ),
    # C4, masked words and next sentences; released code: Adam, rate 1e-4, 10,000 steps of warm-up, linear decay
    "published_pretraining": PretrainingConfig(
        model="fnet_base_pretraining",
        data="c4",  # a folder of .jsonl files with the key "text"
        tokenizer="unigram",
        vocab_size=32_000,
        max_length=512,
        steps=1_000_000,
        batch_size=256,
        learning_rate=1e-4,
        warmup_steps=10_000,
        weight_decay=0.01,
        workers=8,
    ),
}

__all__ = ["PRESETS", "RECIPE", "Config", "PretrainingConfig"]

"""The Transformer learns by the task's default recipe, which is the paper's own; here are its settings."""

from paperzoo.tasks.translation import Config
from paperzoo.tasks.translation import TranslationRecipe as RECIPE

PRESETS = {
    "embedded": Config(
        model="transformer_base",
        data="diary_en_zh",
        vocab_size=500,
        max_length=48,
        embed_dim=64,
        depth=2,
        num_heads=4,
        hidden_dim=256,
        drop_rate=0.0,  # 12,000 sentences from a grammar: nothing to overfit to in 260 steps
        steps=260,
        batch_size=64,
        learning_rate=0.7,
        warmup_steps=80,
        extra_length=10,
        bleu="zh",
    ),
    # sec. 5: WMT14 English-German, 37,000 shared byte pairs, batches of about 25,000 source and target tokens, Adam with
    # beta2 = 0.98 and eq. 3, dropout 0.1, label smoothing 0.1; sec. 6.1: the last 5 checkpoints averaged, beam 4, alpha 0.6
    "published": Config(
        model="transformer_base",
        data="wmt14_en_de",  # a folder with train.en, train.de, test.en, test.de
        source="en",
        target="de",
        tokenizer="bpe",
        vocab_size=37_000,
        max_length=256,
        steps=100_000,
        batch_tokens=25_000,
        learning_rate=1.0,
        warmup_steps=4000,
        average_last=5,
        average_every=1500,  # paper: checkpoints every 10 minutes, which were about 1,500 of its 0.4-second steps
        bleu="13a",
    ),
}
PRESETS["published_big"] = Config(
    **{
        **vars(PRESETS["published"]),
        "model": "transformer_big",
        "steps": 300_000,
        "average_last": 20,
        "average_every": 600,
    }
)

__all__ = ["PRESETS", "RECIPE", "Config"]

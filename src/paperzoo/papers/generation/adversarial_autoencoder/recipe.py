"""Adversarial autoencoders: reconstruct, then let a critic shape the code, then, with labels, name the class (section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import rgb_to_grayscale

from paperzoo.data.images import Images
from paperzoo.engine.models import create
from paperzoo.engine.recipe import running_average
from paperzoo.engine.runtime import Runtime
from paperzoo.errors import PaperZooError
from paperzoo.papers.generation.adversarial_autoencoder.measures import cluster_labels, scatter, sliced_distance
from paperzoo.papers.generation.adversarial_autoencoder.model import Prior, from_prior
from paperzoo.tasks.generation import Count, Fraction, GenerativeRecipe, Positive
from paperzoo.tasks.generation_metrics import parzen_log_likelihood, parzen_width, to_range
from paperzoo.tasks.generation_pictures import sheet

NO_LABEL = -1


@dataclass(frozen=True)
class Config:
    """The paper's five experiments are values of `mode`; rates and momenta are those of appendix A."""

    model: str = "aae"
    mode: Literal["unsupervised", "labelled_prior", "supervised", "semi_supervised", "clustering"] = "unsupervised"
    data: str = "digits"
    image_size: Count = 28
    latent_dim: Count = 8
    width: Count = 1000  # of every hidden layer
    clusters: Count = 16  # of the clustering
    posterior: Literal["deterministic", "gaussian", "universal"] = "deterministic"
    prior: Prior = "gaussian"
    prior_deviation: Positive = 5.0
    initial_deviation: Positive = 0.01  # of fresh weights
    labels_per_class: Annotated[int, Field(ge=1)] | None = None  # how many images may show their label; None: all
    input_noise: Annotated[float, Field(ge=0)] = 0.0  # deviation, added to what the encoder sees in training
    steps: Count = 1000
    batch_size: Count = 100
    learning_rate: Positive = 0.01  # of the reconstruction
    adversarial_learning_rate: Positive = 0.1  # of critics and, against them, the encoder
    semi_supervised_learning_rate: Positive = 0.1
    momentum: Fraction = 0.9  # of the reconstruction and the cross-entropy
    adversarial_momentum: Fraction = 0.1
    milestones: tuple[float, ...] = ()  # shares of the run after which all rates fall
    gamma: Positive = 0.1
    ema_decay: Fraction | None = None
    features: Literal["judge"] = "judge"
    samples: Count = 1000
    workers: Annotated[int, Field(ge=0)] = 0


class Grey(Dataset):
    """Item i is (image float32 (1, S, S) in [0, 1], label, whether the label may be seen)."""

    def __init__(self, images: Images, size: int, shown: set[int] | None) -> None:
        self.images, self.shown, self.size = images.with_transform(to_range(size)), shown, size

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return self.images.path(index)

    @cached_property
    def ready(self) -> Tensor | None:
        """All of a set that is in memory, (N, 1, S, S); None where images are read from files."""
        whole = self.images.pixels
        return None if whole is None else rgb_to_grayscale((to_range(self.size)(whole) + 1) / 2)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.ready is not None:
            image, label = self.ready[index], self.images.targets[index]
        else:
            image, label = self.images[index]
            image = rgb_to_grayscale((image + 1) / 2)
        return image, label if self.shown is None or index in self.shown else NO_LABEL


class AdversarialAutoencoderRecipe(GenerativeRecipe):
    """Each batch: the reconstruction phase; the regularisation phase, critics first; with labels the cross-entropy."""

    config: Config

    def __init__(self, config: Any, runtime: Runtime, facts: dict | None = None) -> None:
        self.conditional = config.mode not in ("unsupervised", "clustering")
        if config.prior != "gaussian" and config.latent_dim != 2:
            raise PaperZooError(f"the prior {config.prior} is flat: latent_dim must be 2, not {config.latent_dim}")
        super().__init__(config, runtime, facts)
        classes = len(self.facts["labels"])
        parts = {"clustering": config.clusters, "semi_supervised": classes, "supervised": classes}.get(config.mode, 0)
        arguments = {"labelled": True} if config.mode == "supervised" else {}
        shared = {"width": config.width, "deviation": config.initial_deviation}
        self.model = runtime.place(
            create(
                config.model,
                image_size=config.image_size,
                latent_dim=config.latent_dim,
                num_classes=parts,
                posterior=config.posterior,
                **arguments,
                **shared,
            )
        )
        num_labels = classes + 1 if config.mode == "labelled_prior" else 0
        self.critic = runtime.place(create("aae_critic", inputs=config.latent_dim, num_labels=num_labels, **shared))
        self.infers = self.model.classes is not None
        encoder = [p for n, p in self.model.named_parameters() if not n.startswith("decoder.")]
        namer = [p for n, p in self.model.named_parameters() if n.startswith(("encoder.", "classes."))]
        rate, momentum = config.adversarial_learning_rate, config.adversarial_momentum
        self.optimizers = {
            "reconstruct": torch.optim.SGD(self.model.parameters(), config.learning_rate, config.momentum),
            "criticise": torch.optim.SGD(self.critic.parameters(), rate, momentum),
            "confuse": torch.optim.SGD(encoder, rate, momentum),
        }
        if self.infers:
            self.class_critic = runtime.place(create("aae_critic", inputs=parts, **shared))
            self.optimizers["criticise classes"] = torch.optim.SGD(self.class_critic.parameters(), rate, momentum)
            if config.mode == "semi_supervised":
                self.optimizers["name"] = torch.optim.SGD(namer, config.semi_supervised_learning_rate, config.momentum)
        self.rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self.average = running_average(self.model, config.ema_decay)

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def shown(self) -> list[int]:
        """The training images whose label may be seen, the same number of each class."""
        targets, few = torch.tensor(self.open("train").targets), self.config.labels_per_class
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        rows = [order[targets[order] == k] for k in range(int(targets.max()) + 1)]
        short = next((k for k, mine in enumerate(rows) if few is not None and len(mine) < few), None)
        if short is not None:
            raise PaperZooError(f"labels_per_class is {few}, but class {short} has {len(rows[short])} images")
        return torch.cat([mine[:few] for mine in rows]).tolist()

    @cached_property
    def batches(self):
        data = Grey(self.open("train"), self.config.image_size, set(self.shown))
        return self.runtime.batches(data, self.config.batch_size, workers=self.config.workers)

    @cached_property
    def labelled_batches(self):
        data = Grey(self.open("train").subset(self.shown), self.config.image_size, None)
        return self.runtime.batches(data, min(self.config.batch_size, 100), "labelled", self.config.workers)

    def batch(self) -> dict[str, Tensor]:
        images, labels = self.batches.next()
        named = self.labelled_batches.next() if self.config.mode == "semi_supervised" else ()
        return {"images": images, "labels": labels, "named": named}

    # -- learning ------------------------------------------------------------------------------------------------

    def drawn(self, stream: str, count: int) -> Tensor:
        """This rank's standard normal noise and, last, uniform numbers: (B, latent_dim + 1)."""
        return self.runtime.to_device(self.runtime.shard(self.noise(count, self.runtime.rng(stream, per_rank=False))))

    def encoded(self, images: Tensor, stream: str) -> tuple[Tensor, Tensor | None]:
        """Codes and class logits of a batch, with the noise that the posterior and the input have in training."""
        rng, count = self.runtime.rng(stream), len(images)
        size = {"gaussian": self.model.latent_dim, "universal": self.model.noise_dim}.get(self.config.posterior)
        noise = None if size is None else torch.randn(count, size, generator=rng).to(images)
        if self.config.input_noise:
            images = images + self.config.input_noise * torch.randn(images.shape, generator=rng).to(images)
        return self.model.encode(images, noise)

    def prior(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, latent_dim) of the prior, from noise as `noise` makes it and labels (B,), -1 for none."""
        config, parts = self.config, len(self.facts["labels"]) if self.conditional else 10
        split = labels if config.mode == "labelled_prior" else torch.full_like(labels, NO_LABEL)
        return from_prior(config.prior, noise[:, :-1], noise[:, -1], split, parts, config.prior_deviation)

    def beside(self, labels: Tensor) -> Tensor | None:
        """What the critic of the code reads beside it: one-hot labels, the last place for none (section 2.3)."""
        if not self.critic.num_labels:
            return None
        last = self.critic.num_labels - 1
        return F.one_hot(torch.where(labels >= 0, labels, last), last + 1).float()

    def step(self, batch: dict[str, Any]) -> dict:
        self.follow_schedule()
        self.model.train()
        images, labels, update = batch["images"], batch["labels"], self.runtime.update
        code, logits = self.encoded(images, "reconstruct")
        given = self.one_hot(labels) if self.config.mode == "supervised" else None
        found = self.model.decode(code, given if logits is None else logits.softmax(1))
        # half the squared Euclidean distance of an image, averaged over the batch
        reconstruction = 0.5 * (found - images).square().flatten(1).sum(1).mean()
        update(self.optimizers["reconstruct"], reconstruction)
        values = {"reconstruction": reconstruction.detach()}

        noise = self.drawn("prior", self.config.batch_size)
        true, beside = self.prior(noise, labels), self.beside(labels)
        with torch.no_grad():
            code, logits = self.encoded(images, "regularise")
        real, fake = self.critic(true, beside), self.critic(code, beside)
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        update(self.optimizers["criticise"], loss)
        values |= {
            "critic_loss": loss.detach(),
            "logit_prior": real.detach().mean(),
            "logit_code": fake.detach().mean(),
        }
        if self.infers:
            parts = self.model.num_classes
            drawn = F.one_hot((noise[:, -1] * parts).long().clamp(max=parts - 1), parts).float()
            loss = F.softplus(-self.class_critic(drawn)).mean()
            loss = loss + F.softplus(self.class_critic(logits.softmax(1))).mean()
            update(self.optimizers["criticise classes"], loss)
            values["class_critic_loss"] = loss.detach()
        code, logits = self.encoded(images, "regularise")
        loss = F.softplus(-self.critic(code, beside)).mean()  # the encoder wants its codes to be taken for the prior's
        if self.infers:
            loss = loss + F.softplus(-self.class_critic(logits.softmax(1))).mean()
        update(self.optimizers["confuse"], loss)
        values["encoder_loss"] = loss.detach()

        if "name" in self.optimizers:
            some, classes = batch["named"]
            loss = F.cross_entropy(self.encoded(some, "name")[1], classes)
            update(self.optimizers["name"], loss)
            values["cross_entropy"] = loss.detach()
        if self.average is not None and self.runtime.micro == self.runtime.accumulate - 1:
            self.average.update_parameters(self.model)
        return values

    def follow_schedule(self) -> None:
        """All rates, as a function of the step."""
        config = self.config
        factor = config.gamma ** sum(self.runtime.step >= m * config.steps for m in config.milestones)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor

    def one_hot(self, labels: Tensor) -> Tensor:
        """(B,) -> (B, num_classes) float32; all zero where there is no label."""
        places = torch.arange(self.model.num_classes, device=labels.device)
        return (labels[:, None] == places).float()

    # -- measuring -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, split: str = "test") -> dict[str, float]:
        """The task's measures of samples; "reconstruction" (half the squared distance); "latent_distance" of the codes to the prior
        (sliced Wasserstein, with "latent_distance_prior" of two draws of the prior as what is possible); the Parzen
        "log_likelihood" of the split (nats, width chosen on training images); and, where classes are inferred, "accuracy".
        """
        metrics = super().evaluate(split)
        with torch.autocast(self.runtime.device.type, enabled=False):
            images, labels = self.tensors(split)
            model = self.deployed.eval()
            given = self.one_hot(labels) if self.config.mode == "supervised" else None
            outputs = model(self.runtime.to_device(images), None if given is None else self.runtime.to_device(given))
            outputs = {k: v.float().cpu() for k, v in outputs.items()}
            error = 0.5 * (outputs["reconstruction"] - images).square().flatten(1).sum(1)
            metrics["reconstruction"] = float(error.mean())
            rng = torch.Generator().manual_seed(self.runtime.key("latent"))
            draws = [self.prior(self.noise(len(images), rng), labels) for _ in range(2)]
            metrics["latent_distance"] = sliced_distance(outputs["code"], draws[0])
            metrics["latent_distance_prior"] = sliced_distance(draws[1], draws[0])
            metrics["log_likelihood"], metrics["parzen_width"] = self.parzen(images)
            if self.config.mode == "semi_supervised":
                metrics["accuracy"] = float((outputs["classes"].argmax(1) == labels).float().mean())
            if self.config.mode == "clustering":
                held, truth = self.tensors("train")
                owner = cluster_labels(model(self.runtime.to_device(held))["classes"].cpu(), truth)
                metrics["accuracy"] = float((owner[outputs["classes"].argmax(1)] == labels).float().mean())
        return metrics

    def parzen(self, images: Tensor) -> tuple[float, float]:
        """Mean log-likelihood of images (N, 1, S, S) under windows around `config.samples` samples, and the windows' width."""
        samples = torch.cat([(x[:, :1] + 1) / 2 for x, _ in self.generated_images()]).flatten(1).cpu()
        widths = torch.logspace(-1.5, 0, 13, dtype=torch.float64)
        width = parzen_width(samples, self.tensors("train")[0][:300].flatten(1), widths)
        return float(parzen_log_likelihood(samples, images.flatten(1), width).mean()), width

    def tensors(self, split: str) -> tuple[Tensor, Tensor]:
        """At most 10,000 images (N, 1, S, S) of a split with their true labels."""
        kept = self.__dict__.setdefault("_tensors", {})
        if split not in kept:
            data = Grey(self.open(split), self.config.image_size, None)
            with torch.inference_mode(False):  # they are kept, and whoever asks next may want gradients
                rows = [data[i] for i in range(min(len(data), 10_000))]
                kept[split] = torch.stack([x for x, _ in rows]), torch.tensor([k for _, k in rows])
        return kept[split]

    # -- use -----------------------------------------------------------------------------------------------------

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """Standard normal numbers and, last, uniform ones: (count, latent_dim + 1)."""
        return torch.cat(
            [torch.randn(count, self.model.latent_dim, generator=rng), torch.rand(count, 1, generator=rng)], dim=1
        )

    @torch.inference_mode()
    def sample(self, noise: Tensor, labels: Tensor) -> Tensor:
        noise, labels = self.runtime.to_device(noise), self.runtime.to_device(labels)
        parts = self.model.num_classes
        chosen = labels if self.conditional else (noise[:, -1] * max(parts, 1)).long().clamp(0, max(parts - 1, 0))
        classes = self.one_hot(chosen) if parts else None
        images = self.deployed.eval().decode(self.prior(noise, labels), classes).float()
        return (2 * images - 1).expand(-1, 3, -1, -1)

    def example(self) -> tuple[Tensor, ...]:
        images = self.tensors("test")[0][:2]
        given = (self.one_hot(torch.arange(2)),) if self.config.mode == "supervised" else ()
        return (images, *given)

    @torch.inference_mode()
    def figures(self) -> dict[str, Image.Image]:
        """The task's sheets, reconstructions, and a flat code as a map of points."""
        images, labels = self.tensors("test")
        given = self.one_hot(labels) if self.config.mode == "supervised" else None
        outputs = self.deployed.eval()(*self.runtime.to_device((images,) if given is None else (images, given)))
        pairs = torch.cat([images[:10], outputs["reconstruction"][:10].float().cpu()]).expand(-1, 3, -1, -1) * 2 - 1
        shown = {"Images, and below them their reconstructions": sheet(pairs, 10, max(1, 64 // self.config.image_size))}
        if self.model.latent_dim == 2:
            shown["Codes of held-out images, a colour for each class"] = scatter(outputs["code"].cpu(), labels)
        return super().figures() | shown


RECIPE = AdversarialAutoencoderRecipe
PRESETS = {
    "embedded": Config(  # section 4: the decoder is told the class, the code is left with style
        mode="supervised",
        image_size=8,
        latent_dim=2,
        width=128,
        prior_deviation=1.0,
        initial_deviation=0.1,  # paper: 0.01, of wider layers and a longer run
        steps=800,
        batch_size=50,
        learning_rate=0.06,  # of fewer pixels' squared error
        ema_decay=0.98,
    ),
    "semi_supervised_digits": Config(
        model="aae_semi_supervised",
        mode="semi_supervised",
        image_size=16,
        latent_dim=4,
        width=256,
        prior_deviation=1.0,
        initial_deviation=0.05,
        labels_per_class=5,
        steps=600,
        ema_decay=0.98,
        learning_rate=0.003,
    ),
    # appendix A.1: codes of 8, a prior of deviation 5; the rates of appendix A.2, since A.1 gives none
    "published": Config(data="mnist", steps=600_000, milestones=(0.05, 0.5), samples=10_000, workers=4),
    "semi_supervised": Config(
        model="aae_semi_supervised",
        mode="semi_supervised",
        data="mnist",
        latent_dim=10,
        prior_deviation=1.0,
        labels_per_class=10,  # 100 labels; 100 a class for 1000
        input_noise=0.3,
        steps=3_000_000,  # 5000 epochs
        milestones=(0.01, 0.2),  # after 50 and 1000 epochs
        workers=4,
    ),
    "clustering": Config(
        model="aae_clustering",
        mode="clustering",
        data="mnist",
        latent_dim=5,
        width=3000,
        prior_deviation=1.0,
        steps=900_000,
        milestones=(0.05, 0.5),
        workers=4,
    ),
    "mixture": Config(
        data="mnist",
        mode="labelled_prior",
        latent_dim=2,
        prior="mixture",
        prior_deviation=1.0,
        labels_per_class=1000,
        steps=600_000,
    ),
    "swiss_roll": Config(
        data="mnist",
        mode="labelled_prior",
        latent_dim=2,
        prior="swiss_roll",
        prior_deviation=1.0,
        labels_per_class=1000,
        steps=600_000,
    ),
    "supervised": Config(mode="supervised", data="mnist", latent_dim=15, steps=600_000),
}

"""Deployed networks: a folder that an inference engine runs, and the paper's recipe around it.

`paperzoo optimize` writes such a folder: a run's own files (`config.toml`, `config.json`, `model.safetensors`), the network
as an engine reads it, and `deploy.json`: engine, precision, the inputs it takes, checksums, and what was measured.
`open_recipe` gives the recipe back with that engine in the network's place, so that predicting, drawing and evaluating are
the same code as before. A call that the engine was not built for (another image size, extra arguments, training) goes to
the network itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from paperzoo.engine.explain import first_line
from paperzoo.engine.export import onnx_session, run_session
from paperzoo.engine.recipe import Recipe
from paperzoo.errors import PaperZooError

FORMAT = 1
SPECIALISED = 8  # shapes that are kept as programs of their own, the last used ones

Runner = Callable[..., list[Tensor]]


# -- engines -----------------------------------------------------------------------------------------------------------


class Specialised:
    """Programs of one file for the shapes that are asked for: constant shapes let an engine plan better."""

    def __init__(self) -> None:
        self.programs: OrderedDict[tuple, Any] = OrderedDict()

    def build(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        raise NotImplementedError

    def program(self, inputs: Sequence[Tensor]) -> Any:
        shapes = tuple(tuple(x.shape) for x in inputs)
        found = self.programs.get(shapes)
        if found is None:
            while len(self.programs) >= SPECIALISED:
                self.programs.popitem(last=False)
            found = self.programs[shapes] = self.build(shapes)
        else:
            self.programs.move_to_end(shapes)
        return found


class OnnxRuntime(Specialised):
    """An ONNX file in ONNX Runtime; on a GPU with CUDA, or TensorRT where it is installed."""

    def __init__(
        self, path: Path, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        super().__init__()
        self.path, self.threads, self.providers = path, threads, list(providers)
        self.symbols: list[list[Any]] = []
        self.names: list[str] = []

    def build(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        sizes = {
            symbol: size
            for symbols, shape in zip(self.described(), shapes, strict=True)
            for symbol, size in zip(symbols, shape, strict=True)
            if isinstance(symbol, str)
        }
        return onnx_session(self.path, self.threads, self.providers, sizes)

    def described(self) -> list[list[Any]]:
        """Each input's sizes, a name where one is open."""
        if not self.symbols:
            import onnx

            graph = onnx.load(str(self.path), load_external_data=False).graph
            constants = {tensor.name for tensor in graph.initializer}
            for value in graph.input:
                if value.name not in constants:
                    sizes = value.type.tensor_type.shape.dim
                    self.symbols.append([d.dim_param or d.dim_value for d in sizes])
                    self.names.append(value.name)
        return self.symbols

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        session = self.program(inputs)
        return run_session(session, self.names, inputs, self.path)


class OpenVINO(Specialised):
    """An OpenVINO model (.xml with its .bin) on the CPU."""

    def __init__(self, path: Path, threads: int | None = None, precision: str = "fp32") -> None:
        super().__init__()
        openvino = need_openvino()
        self.core, self.path, self.precision = openvino.Core(), path, precision
        self.threads = threads or torch.get_num_threads()
        try:
            self.model = self.core.read_model(str(path))
        except Exception as error:
            raise PaperZooError(f"{path}: OpenVINO does not accept it: {first_line(error)}") from error

    def build(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        try:
            return self.compiled(shapes)
        except Exception as error:
            raise PaperZooError(f"{self.path}: OpenVINO cannot plan it: {first_line(error)}") from error

    def compiled(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        model = self.model.clone()
        model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            "CACHE_DIR": "",
        }
        return self.core.compile_model(model, "CPU", options).create_infer_request()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        request = self.program(inputs)
        found = request.infer([x.contiguous().numpy() for x in inputs], share_inputs=True, share_outputs=False)
        return [torch.from_numpy(np.asarray(found[i])) for i in range(len(found))]


class Inductor:
    """A library that TorchInductor compiled ahead of time (.pt2)."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        from torch._inductor import aoti_load_package
        from torch.utils._pytree import tree_leaves

        self.leaves = tree_leaves
        try:
            self.program = aoti_load_package(str(path))
        except Exception as error:
            raise PaperZooError(f"{path}: the compiled library cannot be loaded: {first_line(error)}") from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        return [x for x in self.leaves(self.program(*inputs)) if isinstance(x, Tensor)]


def open_engine(engine: str, path: Path, threads: int | None = None, precision: str = "fp32") -> Runner:
    """A function from input tensors to output tensors.

    Raises:
        PaperZooError: for an unknown engine, one that is not installed, or a file that it does not accept.
    """
    if engine == "onnxruntime":
        return OnnxRuntime(path, threads)
    if engine == "tensorrt":
        return OnnxRuntime(path, threads, tensorrt_providers())
    if engine == "openvino":
        return OpenVINO(path, threads, precision)
    if engine == "inductor":
        return Inductor(path, threads)
    raise PaperZooError(f"engine '{engine}' is not known; there are onnxruntime, openvino, inductor and tensorrt")


def need_openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise PaperZooError("OpenVINO is not installed; it comes with: pip install 'paperzoo[openvino]'") from None
    return openvino


def tensorrt_providers() -> list[str]:
    """ONNX Runtime's providers with TensorRT first.

    Raises:
        PaperZooError: where the installed ONNX Runtime has none.
    """
    import onnxruntime

    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        raise PaperZooError(
            "TensorRT is not there: it needs an NVIDIA GPU, and the packages tensorrt and onnxruntime-gpu"
        )
    return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


# -- the engine in the network's place -----------------------------------------------------------------------------------


class Signature:
    """The inputs that a program takes, and how its outputs are put together again.

    Args:
        inputs: [size or None where it is open, …] and the dtype of each.
        outputs: the structure, as `torch.utils._pytree` writes it.
        structure: that of the arguments where they are nested; None for tensors in a row.
    """

    def __init__(self, inputs: list[tuple[list[int | None], str]], outputs: str, structure: str | None = None) -> None:
        self.inputs, self.outputs, self.structure = inputs, outputs, structure
        self.spec: TreeSpec = treespec_loads(outputs)
        self.arguments = None if structure is None else treespec_loads(structure)

    @classmethod
    def of(cls, network: nn.Module, inputs: Sequence[Tensor], open_sizes: Sequence[Sequence[int]]) -> Signature:
        """That of a network, from one call. `open_sizes` lists the dimensions of each input that may differ.

        Raises:
            PaperZooError: for outputs that are not tensors.
        """
        with torch.inference_mode():
            leaves, spec = tree_flatten(network(*inputs))
        if not all(isinstance(x, Tensor) for x in leaves):
            raise PaperZooError(f"{type(network).__name__} gives more than tensors; an engine cannot stand in for it")
        sizes = [
            [None if i in where else n for i, n in enumerate(x.shape)]
            for x, where in zip(inputs, open_sizes, strict=True)
        ]
        return cls(
            [(s, str(x.dtype).removeprefix("torch.")) for s, x in zip(sizes, inputs, strict=True)],
            treespec_dumps(spec),
            getattr(network, "structure", None),
        )

    def tensors(self, args: tuple, kwargs: dict) -> Sequence[Tensor] | None:
        """The program's inputs in the arguments of a call; None where it cannot take the call."""
        if kwargs:
            return None
        if self.arguments is not None:
            args, spec = tree_flatten(args)
            if spec != self.arguments:
                return None
        return args if self.takes(args) else None

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are inputs of the program."""
        return len(tensors) == len(self.inputs) and all(map(self.fits, tensors, self.inputs))

    @staticmethod
    def fits(value: Any, wanted: tuple[list[int | None], str]) -> bool:
        sizes, dtype = wanted
        return (
            isinstance(value, Tensor)
            and value.ndim == len(sizes)
            and str(value.dtype) == f"torch.{dtype}"
            and all(size in (None, n) for size, n in zip(sizes, value.shape, strict=True))
            and value.numel() > 0
        )

    def restore(self, outputs: list[Tensor]) -> Any:
        return tree_unflatten(outputs, self.spec)


class Installed:
    """An engine as a network's forward; `calls` counts what it answered, `passed_on` what went to the network itself."""

    def __init__(self, network: nn.Module, runner: Runner, signature: Signature, method: str = "forward") -> None:
        self.network, self.runner, self.signature = network, runner, signature
        self.eager = getattr(network, method)
        self.calls = self.passed_on = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        untouched = self.network.training or torch.is_grad_enabled()
        tensors = None if untouched else self.signature.tensors(args, kwargs)
        if tensors is None:
            self.passed_on += 1
            return self.eager(*args, **kwargs)
        self.calls += 1
        return self.signature.restore(self.runner(*tensors))


def owner_of(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a method, named with dots, belongs to, and its own name.

    Raises:
        AttributeError: if there is no such module.
    """
    inside, _, method = name.rpartition(".")
    return network.get_submodule(inside), method


def install(network: nn.Module, runner: Runner, signature: Signature, name: str = "forward") -> Installed:
    """Let an engine answer the calls of a network's method in eval mode without gradients. The method is it from now on."""
    uninstall(network, name)
    network.eval()
    owner, method = owner_of(network, name)
    installed = Installed(owner, runner, signature, method)
    setattr(owner, method, installed)
    return installed


def uninstall(network: nn.Module, name: str = "forward") -> None:
    """The network's own method again."""
    owner, method = owner_of(network, name)
    vars(owner).pop(method, None)


# -- folders -----------------------------------------------------------------------------------------------------------


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_deployed(folder: str | Path) -> bool:
    return (Path(folder) / "deploy.json").exists()


def read_deployment(folder: Path) -> dict[str, Any]:
    """`deploy.json`, after all files that it names were found to be the ones that were written.

    Raises:
        PaperZooError: naming the file that is missing, damaged or of another format.
    """
    path = folder / "deploy.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        known, files = data["format"], data["files"]
    except OSError as error:
        raise PaperZooError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise PaperZooError(
            f"{path}: not the description of a deployed network; write it anew with: paperzoo optimize"
        ) from None
    if known != FORMAT:
        raise PaperZooError(
            f"{path}: of format {known}, this version reads {FORMAT}; write it anew with: paperzoo optimize"
        )
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            raise PaperZooError(f"{file}: is missing; write the folder anew with: paperzoo optimize")
        if checksum(file) != expected:
            raise PaperZooError(
                f"{file}: is damaged (its checksum differs); write the folder anew with: paperzoo optimize"
            )
    return data


def open_recipe(source: str | Path, threads: int | None = None) -> Recipe:
    """A recipe that predicts: from a deployed folder with its engine, from a run's folder or a paper's latest run plainly.

    `recipe.deployed.forward`, or each of `recipe.engine_parts`, is an `Installed` then.

    Raises:
        PaperZooError: for a folder that is neither, or damaged.
    """
    from paperzoo.engine.run import load, run_folder

    folder = run_folder(source)
    if not is_deployed(folder):
        return load(folder, device="cpu")
    data = read_deployment(folder)
    recipe = load(folder, device="cpu")
    if data["engine"] == "eager":
        from paperzoo.engine.inference import make_ready

        make_ready(recipe.deployed, tuple(recipe.example()))
        return recipe
    for name, part in (data.get("parts") or {"forward": data}).items():
        runner = open_engine(data["engine"], folder / part["artefact"], threads, data["precision"])
        inputs = [(list(sizes), dtype) for sizes, dtype in part["inputs"]]
        install(recipe.deployed, runner, Signature(inputs, part["outputs"], part.get("structure")), name)
    return recipe

# SPDX-License-Identifier: Apache-2.0
"""Several adapters in one vLLM server: each request chooses one of them, or none, by a LoRARequest.

    vllm serve BASE --quantization lmoe --hf-overrides '{"lmoe_adapters": {"math": "DIR", "code": "DIR2"}}'
        --enable-lora --max-loras 3 --lora-modules math=DIR code=DIR2 half=DIR#scale=0.5

vLLM brings the choice to the worker as a LoRA id for each token of the batch. Here the ids become the groups of
`lmoe_stacked_`: `AdapterManager` takes the place of vLLM's own manager of LoRA adapters and writes the group and the scale
of each token to tensors that the layers read. No layer of vLLM's LoRA runs.
"""
# pyright: reportMissingImports=false

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lmoe_kernels.checks import check_finite, fail

_OP = "lmoe"
_SCALE = "#scale="
_KNOWN = "0.32.0"  # the versions of vLLM that this module was tried with
_LARGEST = torch.finfo(torch.float32).max


class Choice(NamedTuple):
    """What the tokens of a request get: the blocks of a group, with a factor on their delta."""

    group: int  # the index of the adapter among the directories; -1: none
    scale: float


_NONE = Choice(-1, 1.0)


def directories_of(adapters: object) -> dict[str, str]:
    """The directories of `lmoe_adapters` as absolute paths, by name. Two names may share a directory: the first stays.

    Raises:
        ValueError: it is empty, or a directory does not exist.
        TypeError: it is not a dict of str.
    """
    argument, must = "lmoe_adapters of --hf-overrides", "map names of adapters to directories"
    if not isinstance(adapters, Mapping):
        fail(_OP, argument, must, type(adapters).__name__, TypeError)
    if not adapters:
        fail(_OP, argument, must, "none")
    names: dict[str, str] = {}
    for name, directory in adapters.items():
        if not isinstance(name, str) or not isinstance(directory, str) or not directory:
            fail(_OP, argument, must, f"{name!r}: {directory!r}", TypeError)
        if not Path(absolute := _absolute(directory)).is_dir():
            fail(_OP, argument, "name directories that save_lmoe wrote", f"{name!r}: {directory!r}")
        names.setdefault(absolute, name)
    return {name: directory for directory, name in names.items()}


def choice_of(path: str, directories: Sequence[str]) -> Choice:
    """What a LoRARequest with this path chooses: a directory of `lmoe_adapters`, with "#scale=NUMBER" at its end or not.

    Raises:
        ValueError: it is no such directory, or the scale is not a finite number.
    """
    directory, mark, text = path.rpartition(_SCALE)
    if not mark:
        directory, text = path, "1"
    must = "end with '#scale=' and a finite number"
    try:
        scale = float(text)
    except ValueError:
        fail(_OP, "the path of a LoRARequest", must, repr(path))
    check_finite(_OP, "the path of a LoRARequest", scale, must)
    if abs(scale) > _LARGEST:
        fail(_OP, "the path of a LoRARequest", must, repr(path))
    if (absolute := _absolute(directory)) not in directories:
        must = f"be a directory of lmoe_adapters ({', '.join(directories)})"
        fail(_OP, "the path of a LoRARequest", must, repr(directory))
    return Choice(list(directories).index(absolute), scale)


def _absolute(directory: str) -> str:
    return str(Path(directory).expanduser().resolve())


class TokenChoices:
    """The group and the scale of each token of the batch that runs: `token_group` and `token_scale` of `lmoe_stacked_`.

    Their addresses never change, because CUDA graphs hold them. A batch is written in one copy.

    Args:
        max_tokens: the most tokens of a batch.
        directories: of the adapters; a group is an index into them.
        device: of the model; None: PyTorch's default device.
    """

    group: Tensor  # (max_tokens) int32; -1: no adapter
    scale: Tensor  # (max_tokens), fp32

    def __init__(self, max_tokens: int, directories: Sequence[str], device: torch.device | str | None = None) -> None:
        self.directories = tuple(directories)
        self._both = torch.empty(2, max_tokens, dtype=torch.int32, device=device)
        self.group, self.scale = self._both[0], self._both[1].view(torch.float32)
        self.write((), {})

    def write(self, ids: Sequence[int], choices: Mapping[int, Choice]) -> None:
        """Write the choices of the tokens of a batch, from the LoRA id of each: 0 means none. Tokens beyond get none.

        Each batch gets host memory of its own: PyTorch reuses pinned memory only after the copy from it has ended.
        """
        host = torch.empty(self._both.shape, dtype=torch.int32, device="cpu", pin_memory=self._both.is_cuda)
        group, scale = host[0].numpy(), host[1].view(torch.float32).numpy()
        group[:], scale[:] = _NONE
        numbers = np.asarray(ids, dtype=np.int64)
        for number in np.unique(numbers[numbers > 0]).tolist():
            tokens = np.flatnonzero(numbers == number)
            group[tokens], scale[tokens] = choices[number]
        self._both.copy_(host, non_blocking=True)


class AdapterManager:
    """Takes the place of vLLM's `LRUCacheWorkerLoRAManager` in a worker, with all methods that its model runner calls.

    The adapters of all directories are part of the model from the start: to add one is to learn what an id stands for.

    Args:
        tokens: where the layers read the choices.
        reload: reads the adapter of a group from its directory again, for a LoRARequest with `load_inplace`.
    """

    is_enabled = True

    def __init__(self, tokens: TokenChoices, reload: Callable[[int], None]) -> None:
        self._tokens, self._reload = tokens, reload
        self._paths: dict[int, str] = {}
        self._choices: dict[int, Choice] = {}

    def create_lora_manager(self, model: nn.Module, vllm_config: Any) -> nn.Module:
        """Check that no adapter names a layer of an encoder of images or sound, whose tokens are not those of the batch.

        Raises:
            ValueError: an adapter does.
        """
        if hasattr(model, "get_mm_mapping"):
            mapping: Any = model.get_mm_mapping()  # pyright: ignore[reportCallIssue]
            towers = (*mapping.tower_model, *mapping.connector)
            for name, module in model.named_modules():
                if hasattr(module, "lmoe") and name.startswith(towers):
                    fail(_OP, "the adapters of lmoe_adapters", "name layers of the language model only", name)
        return model

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Write the choices of the tokens of the next forward. The runner calls it before each, also before a CUDA graph
        is recorded or runs.
        """
        for request in requests:
            if self._paths.get(request.lora_int_id) != request.lora_path:
                self._remember(request, self._chosen(request))
        if mapping is not None:
            self._tokens.write(mapping.index_mapping, self._choices)

    def add_adapter(self, request: Any) -> bool:
        """Learn what the id of a LoRARequest stands for, and read its directory again if it says `load_inplace`.

        Raises:
            vllm.exceptions.LoRAAdapterNotFoundError: the path is none of the directories; a server answers 404.
            ValueError: what the directory holds now does not fit.
        """
        choice = self._chosen(request)
        if request.load_inplace:
            self._reload(choice.group)
        self._remember(request, choice)
        return True

    def _chosen(self, request: Any) -> Choice:
        try:
            return choice_of(request.lora_path, self._tokens.directories)
        except ValueError as error:
            raise _not_found(request, error) from None

    def _remember(self, request: Any, choice: Choice) -> None:
        self._paths[request.lora_int_id], self._choices[request.lora_int_id] = request.lora_path, choice

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """vLLM keeps a dummy adapter here while it warms up; there is none."""
        yield

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Let the id of a warm-up request stand for an adapter, so that the warm-up runs as many groups as there are."""
        if request.lora_int_id in self._paths:
            return False
        self._remember(request, Choice((request.lora_int_id - 1) % len(self._tokens.directories), 1.0))
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The rank of a dummy adapter, which nothing reads."""
        return default_rank

    def supports_tower_connector_lora(self) -> bool:
        """Whether encoders of images have adapters: the runner then maps their tokens, too."""
        return False

    def pin_adapter(self, adapter_id: int) -> bool:
        """Every adapter stays in memory; say whether the id is known."""
        return adapter_id in self._paths

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget an id; say whether it was known."""
        self._choices.pop(adapter_id, None)
        return self._paths.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all ids; the next batch brings those that it needs."""
        self._paths.clear()
        self._choices.clear()

    def list_adapters(self) -> set[int]:
        """The ids that are known."""
        return set(self._paths)


def check_setup(vllm_config: Any) -> None:
    """Check that requests can choose, and that every layer gets the tokens of the batch, in order.

    Raises:
        ValueError: a setting of vLLM gives a layer other tokens, or LoRARequests are off.
    """
    parallel, cache_config = vllm_config.parallel_config, vllm_config.cache_config
    if vllm_config.lora_config is None:
        fail(_OP, "enable_lora", "be True with lmoe_adapters: a request chooses its adapter by a LoRARequest", False)
    why = "with lmoe_adapters: layers get other tokens than those of the batch"
    for name, other_tokens in (
        ("enable_dbo or ubatch_size", getattr(parallel, "use_ubatching", False)),
        ("prefill_context_parallel_size > 1", getattr(parallel, "prefill_context_parallel_size", 1) > 1),
        ("enable_expert_parallel on several ranks", getattr(parallel, "use_sequence_parallel_moe", False)),
        ("kv_sharing_fast_prefill", getattr(cache_config, "kv_sharing_fast_prefill", False)),
    ):
        if other_tokens:
            fail(_OP, name, f"be off {why}", "on")
    if vllm_config.model_config.is_encoder_decoder:
        fail(_OP, "the base model", f"be a decoder alone {why}", "an encoder and a decoder")


def _not_found(request: Any, error: Exception) -> Exception:
    """vLLM's error for an unknown adapter, which its server knows by the text, with our reason before it."""
    from vllm.exceptions import LoRAAdapterNotFoundError

    not_found = LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
    not_found.message = f"{error} ({not_found.message})"
    return not_found


def check_interface() -> None:
    """Check that this version of vLLM makes and calls its manager of adapters as the known ones do.

    Raises:
        ValueError: it does not.
    """
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
    from vllm.version import __version__

    differs = [name for name in _public(LRUCacheWorkerLoRAManager) if not hasattr(AdapterManager, name)]
    for owner, name, arguments in (
        (LoRAModelRunnerMixin, "load_lora_model", ["self", "model", "vllm_config", "device"]),
        (LRUCacheWorkerLoRAManager, "set_active_adapters", ["self", "requests", "mapping"]),
        (InputProcessor, "_validate_lora", ["self", "lora_request"]),
    ):
        function = getattr(owner, name, None)
        if function is None or list(inspect.signature(function).parameters) != arguments:
            differs.append(name)
    if differs:
        got = f"{__version__}, where {', '.join(differs)} differ"
        fail(_OP, "vLLM", f"choose LoRA adapters as version {_KNOWN} does, for lmoe_adapters", got)


def _public(of: type) -> list[str]:
    return [name for name in dir(of) if not name.startswith("_")]


@cache
def install() -> None:
    """Let vLLM ask for our manager, and refuse a wrong LoRARequest where it arrives, for models with `lmoe_adapters`.

    Every other model gets what vLLM does. It runs once in each process.

    Raises:
        ValueError: this version of vLLM is too different.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    check_interface()
    load_of_vllm, check_of_vllm = LoRAModelRunnerMixin.load_lora_model, InputProcessor._validate_lora

    def load_lora_model(self: Any, model: nn.Module, vllm_config: Any, device: torch.device) -> nn.Module:
        if not getattr(vllm_config.quant_config, "directories", ()):
            return load_of_vllm(self, model, vllm_config, device)
        config = vllm_config.quant_config
        self.lora_manager = AdapterManager(config.tokens, partial(config.load, model))
        return self.lora_manager.create_lora_manager(model, vllm_config)

    def validate_lora(self: Any, lora_request: Any | None) -> None:
        check_of_vllm(self, lora_request)
        directories = getattr(self.vllm_config.quant_config, "directories", ())
        if lora_request is not None and directories:
            try:
                choice_of(lora_request.lora_path, directories)
            except ValueError as error:
                raise VLLMValidationError(str(error)) from None

    LoRAModelRunnerMixin.load_lora_model = load_lora_model
    InputProcessor._validate_lora = validate_lora

"""Greedy decoding with a static cache, a CUDA graph a step.

`Decoder` is the shortest way from one token to the next with a Transformers model. The cache has a fixed size; the step
from a token to the next is one CUDA graph; the host only replays it and reads tokens as they come, one step behind the
GPU. The model's own code computes the step, by `torch.compile` if asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from .attention import attending
from .inductor import step_options
from .linear import quantized_layers
from .packed import PackedLinear, warmup

_LAYERS = (StaticLayer, StaticSlidingWindowLayer)  # not what inherits from them: layers of hybrid models


class Decoder:
    """Decodes up to ``max_length`` tokens of ``batch_size`` sequences, greedily.

    On a GPU the first call after a change of widths captures a CUDA graph; graphs of widths served before are kept, and
    share memory. On a CPU, for models with sliding windows shorter than ``max_length``, and for models on several
    devices, each step is a plain call.

    Args:
        model: a causal language model, dense or quantised, with weights where they stay.
        batch_size: sequences that are decoded together.
        max_length: most tokens of a sequence, prompt and answer; the cache has this size whatever is in it.
        compile: let ``torch.compile`` fuse what is not a linear layer, without graph breaks: tens of seconds once, for
            all widths. Fewer and faster kernels at each step. Layers that share an input, lie together (`pack`) and are
            served at one width are one call.

    Raises:
        ValueError: a size is not positive, ``compile`` is asked for a model with shorter sliding windows, or the model
            keeps other state than keys and values (Mamba, linear attention): use ``model.generate``.

    Example:
        >>> decoder = Decoder(load("NESTED", bits=4, device="cuda"), max_length=256)        # doctest: +SKIP
        >>> decoder.generate(tokenizer("Why?", return_tensors="pt").input_ids)              # doctest: +SKIP
    """

    def __init__(
        self, model: PreTrainedModel, *, batch_size: int = 1, max_length: int = 2048, compile: bool = False
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.model = model
        self.batch_size, self.max_length = batch_size, max_length
        self._cache = StaticCache(config=model.config, max_cache_len=max_length)
        others = {type(layer).__name__ for layer in self._cache.layers if type(layer) not in _LAYERS}
        if others:
            got = f"{', '.join(sorted(others))} ({type(model).__name__})"
            raise ValueError(f"model must keep keys and values alone in its cache, got {got}: use model.generate")
        window = min((layer.max_cache_len for layer in self._cache.layers if layer.is_sliding), default=max_length)
        if compile and window < max_length:
            raise ValueError(f"compile must be off beyond the sliding window of {window}, got max_length {max_length}")
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        one_gpu = len(devices) == 1 and model.device.type == "cuda"
        self._captures = one_gpu and window >= max_length  # a sliding cache counts on the host
        self._stream = torch.cuda.Stream(model.device) if self._captures else None  # torch's own is of one GPU
        self._token = torch.zeros(batch_size, 1, dtype=torch.long, device=model.device)
        self._layers = list(quantized_layers(model).values())
        self._compiles = compile
        self._open = [m for m in self._layers if isinstance(m, PackedLinear)] if compile else []
        options = step_options(model.device) if compile else None
        self._compute = (
            torch.compile(self._next, fullgraph=True, dynamic=False, options=options) if compile else self._next
        )
        self._graphs: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    def generate(
        self, input_ids: Tensor, max_new_tokens: int | None = None, eos_token_id: int | Iterable[int] | None = None
    ) -> Tensor:
        """Answers of all sequences, without the prompt: integers ``(batch_size, at most max_new_tokens)``, on the CPU.

        Arguments and errors are those of `stream`. A sequence that has ended is filled up with the token that ended it.
        """
        return torch.stack(list(self.stream(input_ids, max_new_tokens, eos_token_id)), dim=1)

    @torch.inference_mode()
    def stream(
        self, input_ids: Tensor, max_new_tokens: int | None = None, eos_token_id: int | Iterable[int] | None = None
    ) -> Iterator[Tensor]:
        """The next token of every sequence, ``(batch_size,)`` on the CPU, as it comes.

        One stream at a time: a second one takes the cache from the first.

        Args:
            input_ids: prompts of one length, ``(batch_size, length)``.
            max_new_tokens: most tokens of an answer; None: as many as there is room for.
            eos_token_id: tokens that end a sequence; decoding ends when all have ended. None: none does.

        Raises:
            TypeError: ``input_ids`` is no tensor: of what a tokenizer gives, ``.input_ids`` is.
            ValueError: the prompts do not have that shape, or prompt and answer are longer than ``max_length``.
        """
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be a tensor, got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.shape[0] != self.batch_size or input_ids.shape[1] < 1:
            got = tuple(input_ids.shape)
            raise ValueError(f"input_ids must have shape ({self.batch_size}, length), got {got}")
        room = self.max_length - input_ids.shape[1]
        if room < 1:
            raise ValueError(f"input_ids must be shorter than max_length {self.max_length}, got {input_ids.shape[1]}")
        count = room if max_new_tokens is None else max_new_tokens
        if not 1 <= count <= room:
            raise ValueError(
                f"max_new_tokens must be 1 to {room}, max_length {self.max_length} less the prompt, got {count}"
            )
        tokens = eos_token_id if hasattr(eos_token_id, "__index__") else list(eos_token_id or ())
        ends = torch.as_tensor(tokens, device="cpu").reshape(-1)
        self.prepare()
        self._cache.reset()
        self._token.copy_(self._next(input_ids.to(self._token.device)))
        ended = torch.zeros(self.batch_size, dtype=torch.bool, device="cpu")
        last = None
        for i in range(count):
            token, arrived = self._read()
            if i + 1 < count:
                self._step()  # the GPU goes on while the host waits for the token before
            if arrived is not None:
                arrived.synchronize()
            if last is not None:
                token = torch.where(ended, last, token)
            yield token
            ended |= torch.isin(token, ends)
            if len(ends) and ended.all():
                return
            last = token

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compile kernels and capture the graph of the widths that are served now, where they are not there yet."""
        if not self._captures or self._widths() in self._graphs:
            return
        warmup(self.model, (self.batch_size,))
        with torch.cuda.device(self._token.device):  # that of streams and graphs is the current one
            self._graphs[self._widths()] = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            if not self._graphs:
                self._next(self._token)  # makes the cache: what is compiled without it is compiled again with it
            for _ in range(2):  # the first call compiles
                self._cache.reset()
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            self._advance()
        return graph

    def _widths(self) -> tuple[int, ...]:
        return tuple(layer.bits for layer in self._layers)

    def _next(self, input_ids: Tensor) -> Tensor:
        """The most likely token after ``input_ids``, which go into the cache."""
        logits = self.model(input_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        return _largest(logits[:, -1])

    def _advance(self) -> None:
        for layer in self._open:
            layer.width_at_run_time = True
        try:
            with attending(self.model.config), _any_number_compiles() if self._compiles else nullcontext():
                self._token.copy_(self._compute(self._token))
        finally:  # what others compile or export of the model is not changed
            for layer in self._open:
                layer.width_at_run_time = False

    def _step(self) -> None:
        graph = self._graphs.get(self._widths())
        if graph is None:
            self._advance()
        else:
            graph.replay()

    def _read(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The present token on its way to the host, and the event of its arrival."""
        if self._token.device.type != "cuda":
            return self._token[:, 0].clone(), None
        token = torch.empty(self.batch_size, dtype=torch.long, device="cpu", pin_memory=True)
        token.copy_(self._token[:, 0], non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self._token.device))
        return token, arrived


def _any_number_compiles() -> AbstractContextManager[None]:
    """Dynamo counts what all decoders compile of one code together; none compiles again what it has."""
    config = torch._dynamo.config
    return config.patch(recompile_limit=config.accumulated_recompile_limit)  # type: ignore[no-any-return]


def _largest(logits: Tensor) -> Tensor:
    """The index of the largest of each row, ``(batch, 1)``, the first if there are several.

    A row is too long for one block of a GPU: the best of each of many parts comes first.
    """
    parts = math.gcd(logits.shape[-1], 256)
    each = logits.unflatten(-1, (parts, -1))
    part = each.amax(-1).argmax(-1, keepdim=True)
    best = each.gather(1, part.unsqueeze(-1).expand(-1, -1, each.shape[-1])).squeeze(1)
    return part * each.shape[-1] + best.argmax(-1, keepdim=True)


def prompt_ids(tokenizer: Any, text: str, *, chat: bool = True) -> Tensor:
    """Token ids ``(1, length)`` of ``text``, as a user's message in the chat template of ``tokenizer``.

    Where there is no template, or not ``chat``: of the text itself, after what the tokenizer puts first (BOS), which a
    template writes by itself.
    """
    chat = chat and bool(tokenizer.chat_template)
    if chat:
        messages = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
    return ids

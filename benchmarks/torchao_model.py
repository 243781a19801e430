"""`torchao`'s dynamic INT8, compiled, on the plain Mamba: what its users have beside our converted models.

    pip install --constraint constraints.txt '.[bench]'

Every `nn.Linear` (the head too) is quantised by `Int8DynamicActivationInt8WeightConfig`; the scan of a prompt is ours,
so that the linears are what differs; all else is left to `torch.compile`, which fuses it. A step is one compiled call,
its recurrence written out for one token. Compiled both as it is and with inductor's `freezing`, which packs constant
weights for the CPU's integer units: which of the two is faster depends on the shape.

Products of one row are wrong by orders of magnitude when torchao 0.18 is compiled for a CPU by torch 2.13 (of two rows
and in eager mode they are right): heads see the last two tokens, and a single sequence is decoded as two.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `K` convolution kernel, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from benchmarks.plain_mamba import PlainMamba, PlainMixer, plain_mamba
from ssm_mp.families.mamba import MambaConfig
from ssm_mp.kernels.scan import selective_scan
from ssm_mp.modules.convolution import conv_silu_reference

States = list[tuple[Tensor, Tensor]]
"""Of each layer: the convolution's last inputs `[b, K − 1, I]`, the scan's state `[b, I, N]`."""


@torch.library.custom_op("ssm_mp_benchmarks::scan", mutates_args=())
def _scan(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Our scan as one operator, which the compiler leaves alone."""
    y, last = selective_scan(a, dt, A, B, C, D, z, None)
    return y, last


@_scan.register_fake
def _shapes(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(a, memory_format=torch.contiguous_format), a.new_empty(a.shape[0], *A.shape)


class TorchaoMamba(nn.Module):
    """A plain Mamba run as a decoder is: `read` a prompt, then `step` by token."""

    def __init__(self, model: PlainMamba) -> None:
        super().__init__()
        self.model = model

    def read(self, ids: Tensor) -> tuple[Tensor, States]:
        """Prompts `ids [b, l]` → logits of the token after each `[b, V]`, and the states."""
        return self._run(ids, None, 0)

    def step(self, tokens: Tensor, states: States, position: Tensor) -> tuple[Tensor, States]:
        """One token of every sequence `[b]`, at least two; the states before it, its position `[1]` → as `read`."""
        return self._run(tokens[:, None], states, position)

    def _run(self, ids: Tensor, states: States | None, position: Tensor | int) -> tuple[Tensor, States]:
        model = self.model
        x = model.embedding(ids)
        if model.position_embedding is not None:
            x = x + model.position_embedding(torch.arange(ids.shape[1]) + position)
        after: States = []
        for i, layer in enumerate(model.layers):
            mixer = layer.ssm
            assert isinstance(mixer, PlainMixer)
            mixed, state = _mix(mixer, x, None if states is None else states[i])
            x = x + mixed
            after.append(state)
        logits: Tensor = model.lm_head(model.norm(x[:, -2:]))[:, -1]
        return logits, after


def _mix(
    mixer: PlainMixer, x: Tensor, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """`x [b, l, d]` → the mixer's output and the state after it."""
    a, z = mixer.in_proj(mixer.norm(x)).chunk(2, dim=-1)  # [b, l, I] each
    weight = mixer.conv1d.weight[:, 0]  # [I, K]
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, a.shape[2]) if state is None else state[0]
    last = torch.cat([before, a], dim=1)[:, -before.shape[1] :]
    a = conv_silu_reference(a, weight, mixer.conv1d.bias, before)
    dt, B, C = mixer.x_proj(a).split(mixer.sizes, dim=-1)  # noqa: N806
    dt = mixer.dt_proj(dt)
    A, D = -torch.exp(mixer.scan.A_log), mixer.scan.D  # noqa: N806
    if state is None:
        y, h = _scan(a, dt, A, B, C, D, z)
    else:
        y, h = _one_step(a[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], state[1])
        y = y[:, None]
    out: Tensor = mixer.out_proj(y)
    return out, (last, h)


def _one_step(
    a: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, h: Tensor  # noqa: N803
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan of one token: `a, dt, z [b, I]`, `B, C [b, N]`, state `h [b, I, N]`."""
    delta = F.softplus(dt)[:, :, None]  # [b, I, 1]
    h = torch.exp(delta * A) * h + delta * a[:, :, None] * B[:, None, :]
    y = (h * C[:, None, :]).sum(dim=-1) + D * a
    return y * F.silu(z), h


def dynamic_int8(config: MambaConfig, tensors: Mapping[str, Tensor]) -> TorchaoMamba:
    """The plain model of these tensors, its linears quantised. Raises ModuleNotFoundError without `torchao`."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = plain_mamba(config, tensors, selective_scan).requires_grad_(False)
    # its own weight, as torchao leaves the embedding alone
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    quantize: Any = quantize_
    quantize(model, Int8DynamicActivationInt8WeightConfig())
    return TorchaoMamba(model)


def compiled(function: Callable[..., Any], freezing: bool) -> Callable[..., Any]:
    """`function` of fixed shapes through inductor, with or without its constants packed."""
    return torch.compile(function, dynamic=False, fullgraph=True, options={"freezing": freezing})

"""The Mamba family out of PyTorch's own layers, as tools that rewrite `nn.Linear` and `nn.Embedding` expect a model.

Every module stands under the name of the component that it holds, so that what a tool decides about a module is a
decision about that component. The tied head is an `nn.Linear` that shares its weight with the embedding.

Dimensions: `b` batch, `l` length, `d` model, `I` inner, `N` state, `R` step rank, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from torch import Tensor, nn

from ssm_mp.families.mamba import MambaConfig
from ssm_mp.kernels.scan import Scan, selective_scan_reference

HEAD = "lm_head"
"""Name of the head's module; with a tied head it stands for the component `embedding`."""


class PlainScan(nn.Module):
    """The selective scan with the parameters that only it uses."""

    def __init__(self, config: MambaConfig, scan: Scan) -> None:
        super().__init__()
        self.scan = scan
        self.A_log = nn.Parameter(torch.empty(config.d_inner, config.d_state))
        self.D = nn.Parameter(torch.empty(config.d_inner))

    def forward(self, a: Tensor, dt: Tensor, B: Tensor, C: Tensor, z: Tensor) -> Tensor:  # noqa: N803
        """`a, dt, z [b, l, I]`, `B, C [b, l, N]` → `[b, l, I]`, gated by `z`."""
        return self.scan(a, dt, -torch.exp(self.A_log), B, C, self.D, z, None)[0]


class PlainMixer(nn.Module):
    """Norm, gated convolution, selective scan, projection."""

    def __init__(self, config: MambaConfig, scan: Scan) -> None:
        super().__init__()
        d, inner, bias = config.d_model, config.d_inner, config.projection_bias
        self.sizes = (config.dt_rank, config.d_state, config.d_state)
        self.norm = _norm(config)
        self.in_proj = nn.Linear(d, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(
            inner, inner, config.d_conv, groups=inner, padding=config.d_conv - 1, bias=config.conv_bias
        )
        self.x_proj = nn.Linear(inner, config.dt_rank + 2 * config.d_state, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, inner)
        self.scan = PlainScan(config, scan)
        self.out_proj = nn.Linear(inner, d, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → the mixer's output `[b, l, d]`, before the residual."""
        a, z = self.in_proj(self.norm(x)).chunk(2, dim=-1)  # [b, l, I] each
        a = F.silu(self.conv1d(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        dt, B, C = self.x_proj(a).split(self.sizes, dim=-1)  # [b, l, R], [b, l, N], [b, l, N]  # noqa: N806
        out: Tensor = self.out_proj(self.scan(a, self.dt_proj(dt), B, C, z))
        return out


class PlainLayer(nn.Module):
    """One residual layer."""

    def __init__(self, config: MambaConfig, scan: Scan) -> None:
        super().__init__()
        self.ssm = PlainMixer(config, scan)

    def forward(self, x: Tensor) -> Tensor:
        """`x [b, l, d]` → `[b, l, d]`."""
        mixed: Tensor = self.ssm(x)
        return x + mixed


class PlainMamba(nn.Module):
    """Token ids `[b, l]` → logits `[b, l, V]`."""

    def __init__(self, config: MambaConfig, scan: Scan) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.d_model)
        self.position_embedding = None if config.max_length is None else nn.Embedding(config.max_length, config.d_model)
        self.layers = nn.ModuleList(PlainLayer(config, scan) for _ in range(config.n_layers))
        self.norm = _norm(config)
        self.lm_head = nn.Linear(config.d_model, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids `[b, l]` → logits `[b, l, V]`."""
        x = self.embedding(ids)
        if self.position_embedding is not None:
            x = x + self.position_embedding(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def plain_mamba(
    config: MambaConfig, tensors: Mapping[str, Tensor], scan: Scan = selective_scan_reference
) -> PlainMamba:
    """The plain model of canonical float tensors (copied), in eval mode; the default scan is differentiable.

    Raises RuntimeError where a tensor has no place in it, or a place no tensor.
    """
    model = PlainMamba(config, scan)
    state = {_in_scan(name): tensor for name, tensor in tensors.items()}
    if config.tied:
        state[f"{HEAD}.weight"] = state["embedding.weight"]
    model.load_state_dict(state)
    return model.eval()


def _in_scan(name: str) -> str:
    """The state name of a canonical tensor: `A_log` and `D` belong to the scan module."""
    path, _, leaf = name.rpartition(".")
    return f"{path}.scan.{leaf}" if leaf in ("A_log", "D") else name


def share_lookup(embedding: nn.Module, quantized: Callable[[], Tensor]) -> None:
    """Let the token lookup read the head's rows as a tool quantises them: a tied weight is stored once."""

    def look_up(_module: nn.Module, arguments: tuple[Tensor], _output: Tensor) -> Tensor:
        return F.embedding(arguments[0], quantized())

    embedding.register_forward_hook(look_up)


def _norm(config: MambaConfig) -> nn.Module:
    if config.norm == "layer":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)

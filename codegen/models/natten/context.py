"""NATTEN's switches. They are kept and told again; gnaforge's kernels have nothing that they would switch: gradients
are deterministic, and flex attention isn't used."""

from __future__ import annotations

from typing import Any

_state: dict[str, Any] = {"deterministic": False, "kv_parallelism": True, "memory": "default", "flex": [False, False]}


def use_deterministic_algorithms(mode: bool = True) -> None:
    _state["deterministic"] = mode


def are_deterministic_algorithms_enabled() -> bool:
    return bool(_state["deterministic"])


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    _state["kv_parallelism"] = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    return bool(_state["kv_parallelism"])


def set_memory_usage_preference(pref: str = "default") -> None:
    """``pref`` is ``default``, ``strict`` or ``unrestricted``; anything else raises a ValueError."""
    if pref not in ("default", "strict", "unrestricted"):
        raise ValueError(f"memory usage preference {pref!r}: it is default, strict or unrestricted")
    _state["memory"] = pref


def get_memory_usage_preference() -> str:
    return str(_state["memory"])


def is_memory_usage_default() -> bool:
    return get_memory_usage_preference() == "default"


def is_memory_usage_strict() -> bool:
    return get_memory_usage_preference() == "strict"


def is_memory_usage_unrestricted() -> bool:
    return get_memory_usage_preference() == "unrestricted"


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    _state["flex"] = [mode, mode and backprop]


def allow_flex_compile_backprop(mode: bool = True) -> None:
    _state["flex"][1] = mode


def disable_flex_compile() -> None:
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    return bool(_state["flex"][0])


def is_flex_compile_backprop_allowed() -> bool:
    return bool(_state["flex"][1])


def use_fused_na(mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False) -> None:
    """Of releases before 0.20; attention is always fused, but for what `functional` computes in plain torch."""


def is_fused_na_enabled() -> bool:
    return True


def has_fused_na() -> bool:
    return True


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def has_half(device: Any = None) -> bool:
    return True


def has_bfloat(device: Any = None) -> bool:
    return True


def _no_configs(*args: Any, **kwargs: Any) -> list[Any]:
    """Tiles of NATTEN's own kernels, of which there are none here; `gnaforge.kernels` lists those that there are."""
    return []


_BACKENDS = [f"cutlass_{arch}{op}" for arch in ("", "hopper_", "blackwell_") for op in ("fmha", "fna")]
_LISTS = [f"get_{way}configs_for_{backend}" for way in ("", "bwd_") for backend in _BACKENDS]
_LISTS += ["get_configs_for_flex_fmha", "get_configs_for_flex_fna"]
globals().update(dict.fromkeys(_LISTS, _no_configs))


def _no_effect(*args: Any, **kwargs: Any) -> None:
    """A switch of releases before 0.20, between kernels, number formats and searches that aren't here."""


def _never(*args: Any, **kwargs: Any) -> bool:
    """What such a switch is: off."""
    return False


has_fna, is_fna_enabled, use_fna = has_fused_na, is_fused_na_enabled, use_fused_na
_SWITCHES = [
    f"{way}_{what}"
    for way in ("enable", "disable")
    for what in ("fused_na", "fna", "autotuner", "tiled_na", "gemm_na", "tf32")
]
_SWITCHES += ["use_autotuner", "use_tiled_na", "use_gemm_na", "use_tf32_in_gemm_na"]
_OFF = [f"is_autotuner_{state}_for_{way}" for state in ("enabled", "thorough") for way in ("forward", "backward")]
_OFF += ["is_autotuner_enabled", "is_tiled_na_enabled", "is_gemm_na_enabled", "is_tf32_in_gemm_na_enabled"]
_OFF += ["has_gemm", "has_fp32_gemm", "has_fp64_gemm", "has_tf32_gemm"]
globals().update(dict.fromkeys(_SWITCHES, _no_effect) | dict.fromkeys(_OFF, _never))

"""From configs to source text. Pure: the same config gives the same bytes, on every machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jinja2

from ..errors import InputError
from ..families import family_of
from ..runtime.config import KernelConfig
from .identity import LIBRARY_TEMPLATE, template_dir, template_dirs


@dataclass(frozen=True)
class Sources:
    """The rendered sources of a library: the text of each kernel's translation unit, sorted, and of the table."""

    library: str
    kernels: Mapping[KernelConfig, str]
    table: str


@lru_cache(maxsize=16)
def _environment(*folders: Path) -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders or template_dir()),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def source_suffix(config: KernelConfig) -> str:
    """``.cpp`` or ``.cu``."""
    return Path(family_of(config).template).suffixes[0]


def render_kernel(config: KernelConfig) -> str:
    """Source of one kernel: a translation unit that defines the entry named ``config.symbol``."""
    family = family_of(config)
    try:
        template = _environment(*template_dirs(family)).get_template(family.template)
        return template.render(config=config, facts=family.template_facts(config))
    except jinja2.UndefinedError as error:
        text = f"the template of the kernel family {family.name} takes what this config doesn't have: {error}"
        raise InputError(f"{config}: {text}") from error
    except jinja2.TemplateNotFound as error:
        raise InputError(f"{config}: the kernel family {family.name} has no template: {error}") from error


def render_library(library: str, configs: Iterable[KernelConfig], *, emulated: bool = False) -> str:
    """Source of the table that makes a library of kernels; exports ``gnaforge_library_v1``."""
    template = _environment().get_template(LIBRARY_TEMPLATE)
    return template.render(library=library, configs=sorted(configs), emulated=emulated)


def render_sources(library: str, configs: Iterable[KernelConfig]) -> Sources:
    """All sources of a library."""
    configs = sorted(configs)
    return Sources(library, {config: render_kernel(config) for config in configs}, render_library(library, configs))


def render_wheel(file: str, /, **values: object) -> str:
    """A file of a wheel, by its template's name below ``wheel/`` without the suffix ``.j2``."""
    return _environment().get_template(f"wheel/{file}.j2").render(**values)


def wheel_package_templates() -> list[str]:
    """Names of the rendered files of a wheel's package."""
    return sorted(path.stem for path in (template_dir() / "wheel" / "package").glob("*.j2"))

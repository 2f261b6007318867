"""Adapters to the packages that people run models with; each is imported only when it is asked for.

`gnaforge.models.diffusers`, `gnaforge.models.lightx2v`, `gnaforge.models.vllm_omni`: windows in the attention of their
transformers. `gnaforge.models.natten`: NATTEN's names, for code that imports it. `gnaforge.models.physicsnemo`: its
tensors whose tokens are divided over ranks.
`gnaforge.models.schedule`: windows by layer and by step, as published models have them. None of these packages is a
dependency of gnaforge.
"""

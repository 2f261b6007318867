"""Adapters to the packages that people run models with; each is imported only when it is asked for.

`gnaforge.models.diffusers`: windows in the attention of diffusers' transformers. `gnaforge.models.natten`: NATTEN's
names, for code that imports it. `gnaforge.models.physicsnemo`: its tensors whose tokens are divided over ranks.
`gnaforge.models.schedule`: windows by layer and by step, as published models have them. None of these packages is a
dependency of gnaforge.
"""

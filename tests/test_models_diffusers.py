"""Windows in diffusers' transformers, beside the same models with SDPA under the whole mask."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import sys
import threading
from types import SimpleNamespace
from typing import Any

import gnaforge.models.diffusers as adapter
import pytest
import torch
from gnaforge.errors import InputError
from gnaforge.models.layouts import grid_of
from gnaforge.models.schedule import Pattern, Schedule

pytest.importorskip("diffusers")
from diffusers import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.autoencoders import ltx2_diffusion_decoder as ltx
from diffusers_models import GRIDS, MODELS, inputs, make, to, whole_mask

pytestmark = pytest.mark.usefixtures("kernel_set", "one_thread")

WINDOW = {"kernel_size": (2, 5, 3), "stride": (1, 2, 1)}
WINDOWS = {name: {key: value[-len(GRIDS[name]) :] for key, value in WINDOW.items()} for name in MODELS}
PROBLEMS = {name: {"window": own["kernel_size"], "stride": own["stride"], "heads": 2} for name, own in WINDOWS.items()}


def sparsify(name: str, model: torch.nn.Module, **options: Any) -> adapter.Handle:
    window = {} if "schedule" in options or "kernel_size" in options else WINDOWS[name]
    return adapter.sparsify(model, **window, **({"grid": GRIDS[name]} if name == "flux" else {}), **options)


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**given).sample  # type: ignore[no-any-return]


def masked(name: str, model: torch.nn.Module, given: dict[str, Any], **pattern: Any) -> torch.Tensor:
    with whole_mask(name, model, GRIDS[name], **(pattern or PROBLEMS[name])) as calls:
        out = run(model, given)
    assert len(calls) == 2  # one for each layer
    return out


@pytest.mark.parametrize("name", MODELS)
def test_output_beside_sdpa_with_the_whole_mask(name: str) -> None:
    model, given = make(name), inputs(name)
    dense, want = run(model, given), masked(name, model, given)
    assert (dense - want).abs().max() > 1e-2  # windows matter
    handle = sparsify(name, model)
    torch.testing.assert_close(run(model, given), want, rtol=1e-4, atol=1e-4)
    report = handle.report().splitlines()
    assert "1 forward pass, grid " + "x".join(map(str, GRIDS[name])) in report[0]
    assert len(report) == 3 and all(f"kernel_size {WINDOWS[name]['kernel_size']}" in line for line in report[1:])
    # In bf16 the model is as far from the float32 result as it is with SDPA, give or take.
    low = copy.deepcopy(make(name)).to(torch.bfloat16)
    theirs = (masked(name, low, to(given, torch.bfloat16)) - want).abs()
    sparsify(name, low)
    ours = (run(low, to(given, torch.bfloat16)) - want).abs()
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 1.5 * theirs.mean()
    handle.remove()
    torch.testing.assert_close(run(model, given), dense, rtol=0, atol=0)
    handle.remove()
    assert handle.report().splitlines() == [f"{report[0]}; windows were removed since", *report[1:]]


@pytest.mark.parametrize("name", ["cosmos", "hunyuan"])
def test_autocast(name: str) -> None:
    """Queries and keys are float32 there, values bfloat16: the cast is the operator's own, as it is SDPA's."""
    model, given = make(name), inputs(name)
    want = masked(name, model, given)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = (masked(name, model, given) - want).abs()
        sparsify(name, model)
        ours = (run(model, given) - want).abs()
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 1.5 * theirs.mean()


@pytest.mark.parametrize(("name", "whole"), [("wan", True), ("hunyuan", False)])
def test_compiled(name: str, whole: bool) -> None:
    """The whole model as one graph; its blocks, as diffusers recommends."""
    model, given = make(name), inputs(name)
    sparsify(name, model)
    want = run(model, given)
    torch._dynamo.reset()
    if whole:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(run(model, given), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_compiled_before_any_pass(name: str) -> None:
    """And on a grid that no pass had before, with windows of two kinds and a dense layer."""
    model, twin = make(name, layers=3), make(name, layers=3)
    axes = len(GRIDS[name])
    wide = Pattern((-1, 3, 5)[-axes:])
    schedule = Schedule([Pattern(WINDOWS[name]["kernel_size"], stride=WINDOWS[name]["stride"]), wide, None])
    handle, other = (sparsify(name, one, schedule=schedule) for one in (model, twin))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for grid in (GRIDS[name], (2, 5, 6)[-axes:]):
        if name == "flux":
            handle.grid = other.grid = grid
        given = inputs(name, grid)
        torch.testing.assert_close(run(compiled, given), run(twin, given), rtol=1e-5, atol=1e-5)
        assert handle.report().split("\n", 1)[1].replace("; hasn't run yet", "") == other.report().split("\n", 1)[1]


def test_windows_in_a_compiled_model() -> None:
    """One that ran before, dense: with windows and without them it is compiled anew."""
    model, given = make("wan"), inputs("wan")
    dense, want = run(model, given), masked("wan", model, given)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, given), dense, rtol=1e-4, atol=1e-4)
    handle = sparsify("wan", compiled)
    torch.testing.assert_close(run(compiled, given), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="has windows already"):
        sparsify("wan", model)
    handle.remove()
    torch.testing.assert_close(run(compiled, given), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_each_grid(reentrant: bool) -> None:
    """Blocks are computed again in the backward pass, after a forward pass on another grid and outside of the model."""

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = make("wan").train()
        if checkpointing:
            again = torch.utils.checkpoint.checkpoint
            model.enable_gradient_checkpointing(lambda f, *args: again(f.__call__, *args, use_reentrant=reentrant))
        sparsify("wan", model)
        given = [inputs("wan", grid) for grid in ((3, 6, 5), (2, 5, 6))]
        for one in given:
            one["hidden_states"].requires_grad_()
        sum(model(**one).sample.square().mean() for one in given).backward()  # type: ignore[union-attr]
        return [parameter.grad for parameter in model.parameters()] + [one["hidden_states"].grad for one in given]

    plain, again = gradients(False), gradients(True)
    for want, got in zip(plain, again, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert any(grad.abs().max() > 1e-3 for grad in plain)


def test_blocks_of_one_window_share_a_graph() -> None:
    """As without windows; each further window makes one more. With a graph for each block, torch would give up at 8."""
    model, given = make("wan", layers=12), inputs("wan")
    sparsify("wan", model, dense_layers=[0, 7])
    want = run(model, given)
    torch._dynamo.reset()
    graphs: list[Any] = []
    model.compile_repeated_blocks(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    torch.testing.assert_close(run(model, given), want, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2


def test_the_grid_of_flux_is_read() -> None:
    """From its positions, once for a tensor; a grid that is given has to be theirs."""
    model, given = make("flux"), inputs("flux")
    want = masked("flux", model, given)
    handle = adapter.sparsify(model, **WINDOWS["flux"])
    for _ in range(2):
        torch.testing.assert_close(run(model, given), want, rtol=1e-4, atol=1e-4)
    for grid in ((7, 8), (1, 6), (6, 1)):
        run(model, inputs("flux", grid))
        assert "grid " + "x".join(map(str, grid)) in handle.report()
    given["img_ids"].copy_(inputs("flux", (7, 8))["img_ids"])  # in place
    run(model, given)
    given["img_ids"].copy_(inputs("flux", (4, 14))["img_ids"])
    run(model, given)
    assert "grid 4x14" in handle.report()
    handle.grid = (14, 4)
    with pytest.raises(InputError, match=r"the grid \(14, 4\) has 56 tokens, and the image 56, in a grid \(4, 14\)"):
        run(model, given)
    handle.grid = None
    with torch.inference_mode():
        for grid in ((4, 14), (8, 7)):
            model(**inputs("flux", grid))
            assert "grid " + "x".join(map(str, grid)) in handle.report()


def test_positions_that_are_no_grid() -> None:
    ids = inputs("flux", (300, 400))["img_ids"]
    assert grid_of("img_ids", ids.bfloat16()) == grid_of("img_ids", ids[None]) == (300, 400)
    small = inputs("flux", (4, 6))["img_ids"]
    reference = small + torch.tensor([1.0, 0.0, 0.0])
    irregular = small.clone()
    irregular[10, 2] = 0
    for wrong in (torch.cat([small, reference]), small[:-1], small * 0, irregular, small[torch.randperm(24)]):
        with pytest.raises(InputError, match="img_ids are not those of one image"):
            grid_of("img_ids", wrong)


def test_gradients_with_text() -> None:
    model, given = make("flux"), inputs("flux")
    with whole_mask("flux", model, GRIDS["flux"], **PROBLEMS["flux"]):
        model(**given).sample.square().mean().backward()
    want = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    sparsify("flux", model)
    model(**given).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, want[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_one_model_only() -> None:
    """Another model of the class, and diffusers' own functions, are as before."""
    other, given = make("wan"), inputs("wan")
    dense = run(other, given)
    model = make("wan")
    dispatch = sys.modules[type(model).__module__].dispatch_attention_fn  # type: ignore[attr-defined]
    sparsify("wan", model)
    run(model, given)
    assert sys.modules[type(model).__module__].dispatch_attention_fn is dispatch  # type: ignore[attr-defined]
    torch.testing.assert_close(run(other, given), dense, rtol=0, atol=0)


def test_a_layer_without_its_window_is_an_error() -> None:
    given = inputs("wan")
    model = make("wan")
    sparsify("wan", model)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1 was called outside of its model"):
        model.forward(**given)
    run(model, given)
    with pytest.raises(RuntimeError, match="outside of its model"):  # also after a call with hooks
        model.forward(**given)
    with pytest.raises(RuntimeError, match="outside of its model"):  # and of a copy
        run(copy.deepcopy(model), given)
    cls = type(model.blocks[1].attn1)._default_processor_cls
    model.blocks[1].attn1.set_processor(cls())
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 lost its window: it was replaced after sparsify"):
        run(model, given)
    other = make("wan")
    sparsify("wan", other)
    other.blocks[0].attn1 = make("wan").blocks[0].attn1
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn1 lost its window"):
        run(other, given)


def test_a_model_with_windows_is_not_pickled() -> None:
    model, given = make("wan"), inputs("wan")
    handle = sparsify("wan", model)
    want = run(model, given)
    for save in (pickle.dumps, lambda one: torch.save(one, io.BytesIO())):
        with pytest.raises(pickle.PicklingError, match="call its handle's remove first, or save its state_dict"):
            save(model)
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    model.load_state_dict(torch.load(file))
    torch.testing.assert_close(run(model, given), want, rtol=0, atol=0)
    handle.remove()
    dense = run(model, given)
    torch.testing.assert_close(run(pickle.loads(pickle.dumps(model)), given), dense, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [None, [1, 2]])
def test_blocks_may_be_skipped(layers: list[int] | None) -> None:
    """As caches of diffusers do: of two alike passes the second computes the first block only, windows or not."""
    model, given = make("wan", layers=3), inputs("wan")
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    sparsify("wan", model, layers=layers)
    ran: list[int] = []
    for number, block in enumerate(model.blocks):
        block.attn1.to_out[0].register_forward_hook(lambda *_, n=number: ran.append(n))
    with model.cache_context("cond"):
        outs = [run(model, given) for _ in range(2)]
    assert ran == [0, 1, 2, 0]
    torch.testing.assert_close(outs[0], outs[1])


def test_a_pass_without_any_block() -> None:
    """As caches of whole passes have: the report says which layers haven't run."""
    model, given = make("wan"), inputs("wan")
    handle = sparsify("wan", model)
    blocks = [block.forward for block in model.blocks]
    for block in model.blocks:
        block.forward = lambda hidden_states, *others: hidden_states
    run(model, given)
    assert handle.report().count("; hasn't run yet") == 2
    model.blocks[1].forward = blocks[1]
    run(model, given)
    assert [line.endswith("; hasn't run yet") for line in handle.report().splitlines()] == [False, True, False]


def test_one_forward_pass_at_a_time() -> None:
    """A second one of another thread is refused, and the first goes on; an interrupted one leaves the model usable."""
    model, given = make("wan"), inputs("wan")
    sparsify("wan", model)
    want = run(model, given)
    refused: list[str] = []

    def second() -> None:
        try:
            run(model, inputs("wan", (2, 5, 6)))
        except RuntimeError as error:
            refused.append(str(error))

    def begin(*_: Any) -> None:
        hook.remove()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    hook = model.blocks[0].register_forward_pre_hook(begin)
    torch.testing.assert_close(run(model, given), want, rtol=0, atol=0)
    assert refused == ["WanTransformer3DModel is in a forward pass of another thread: run one at a time"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, inputs("wan", (2, 5, 6)))
    hook.remove()
    torch.testing.assert_close(run(model, given), want, rtol=0, atol=0)
    refused.clear()
    begin()  # another thread, later, is none at the same time
    assert refused == []


def test_keys_of_another_number_are_left_alone() -> None:
    """Such as those of an image prompt, which some processors attend to beside the image."""
    model = make("wan")
    sparsify("wan", model)
    module: Any = sys.modules[type(model).__module__]
    seen = []

    def attend(hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        q = hidden_states.unflatten(-1, (2, -1))
        inner = inspect.getclosurevars(type(model.blocks[0].attn1.processor).__call__).nonlocals["own"]
        dispatch = inner.__globals__["dispatch_attention_fn"]
        seen.append((dispatch(q, q[:, :5], q[:, :5]), module.dispatch_attention_fn(q, q[:, :5], q[:, :5])))
        return torch.zeros_like(hidden_states)

    model.blocks[0].attn2.forward = attend
    run(model, inputs("wan"))
    torch.testing.assert_close(*seen[0])


def test_a_failed_pass_leaves_no_grid() -> None:
    model = make("wan")
    sparsify("wan", model)
    with pytest.raises(Exception):  # noqa: B017  # whatever diffusers says of text of another width
        run(model, inputs("wan") | {"encoder_hidden_states": torch.randn(2, 7, 5)})
    with pytest.raises(RuntimeError, match="outside of its model"):
        model.forward(**inputs("wan"))


def test_what_is_refused() -> None:
    model = make("wan")
    handle = sparsify("wan", model)
    handle.remove()
    handle = sparsify("wan", model, layers=[0])
    with pytest.raises(InputError, match="WanTransformer3DModel has windows already: call its handle's remove first"):
        sparsify("wan", model, layers=[1])
    run(model, inputs("wan"))  # and the model is what it was
    handle.remove()
    refused = {
        "layers names layer 2, and there are 2": {"layers": [2]},
        "dense_layers names layer 5, and there are 2": {"dense_layers": [5]},
        "the schedule names layer 2": {"schedule": Schedule.from_mask_strategies({"0_2_0": [1, 1, 1]})},
        "has its grid from its input": {"grid": (3, 6, 5)},
        "there are no windows: give kernel_size, or a schedule": {"kernel_size": None},
        "layers is 1; it is a list of layers": {"layers": 1},
        "dense_layers is 1; it is a list of layers": {"dense_layers": 1},
        r"schedule is \[\]; make it by Schedule": {"schedule": []},
        "layout is 'wan'; make it by Layout": {"layout": "wan"},
        r"dense_steps is 1\.5": {"dense_steps": 1.5},
        "kernel_size is '3'": {"kernel_size": "3"},
        "kernel_size has 2 axes, and the grid 3": {"kernel_size": (3, 5)},
        r"stride is 4 along axis 0; it must be 1 to kernel_size \(3\)": {"kernel_size": 3, "stride": 4},
        "the schedule says windows: leave kernel_size out": {"kernel_size": 3, "schedule": Schedule([None] * 2)},
        "the schedule is for 3 layers": {"schedule": Schedule([None] * 3)},
        "leave them out": {"schedule": Schedule([None] * 2), "dense_steps": 3},
        "dense_steps is -1": {"dense_steps": -1},
        "the schedule has 1 steps, and the run 2": {
            "schedule": Schedule.from_mask_strategies({"0_1_0": [1, 1, 1]}),
            "steps": 2,
        },
    }
    for message, options in refused.items():
        with pytest.raises(InputError, match=message):
            sparsify("wan", model, **options)
    with pytest.raises(InputError, match="Linear is not known, only CosmosTransformer3DModel"):
        adapter.sparsify(torch.nn.Linear(2, 2), kernel_size=3)
    with pytest.raises(InputError, match="doesn't know its grid"):
        packed = adapter.Layout(("transformer_blocks", "single_transformer_blocks"), "attn", (), "first")
        adapter.sparsify(make("flux"), kernel_size=3, layout=packed)
    with pytest.raises(InputError, match="kernel_size has 3 axes, and the grid 2"):
        adapter.sparsify(make("flux"), kernel_size=(1, 3, 3))
    flux = make("flux")
    flux_handle = adapter.sparsify(flux, kernel_size=3, grid=(8, 8))
    with pytest.raises(InputError, match=r"the grid \(8, 8\) has 64 tokens, and the image 56"):
        run(flux, inputs("flux"))
    for wrong in (192, (8.0, 7.0), (), "8x7", (0, 56)):
        with pytest.raises(InputError, match="it is the number of tokens along each axis"):
            flux_handle.grid = wrong  # type: ignore[assignment]
    with pytest.raises(InputError, match="has its grid from its input"):
        sparsify("wan", make("wan")).grid = (3, 6, 5)
    flux_handle.grid = (8, 7)
    run(flux, inputs("flux"))

    class Processor:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
            return hidden_states

    model.blocks[0].attn1.set_processor(Processor())
    with pytest.raises(InputError, match="its processor Processor doesn't compute attention by dispatch_attention_fn"):
        sparsify("wan", model)


def _float(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)


def _without(place: int) -> Any:
    return lambda mask: mask.index_fill(-1, torch.tensor([place]), False)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_float, "a mask of torch.float32 says no lengths: windows go with a bool mask"),
        (lambda mask: mask.int(), "a mask of torch.int32 says no lengths"),
        (_without(0), "the mask leaves out tokens of the image"),
        (_without(89), "the mask leaves out tokens of the image"),
        (_without(90), "the mask leaves out text in front of other text"),
        (_without(92), "the mask leaves out text in front of other text"),
        (lambda mask: mask.expand(-1, -1, 97, -1), r"a mask of shape \(2, 1, 97, 97\) is more than padding"),
    ],
)
def test_masks_that_are_no_lengths_are_refused(changed: Any, message: str) -> None:
    model = make("hunyuan")
    sparsify("hunyuan", model)

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"attention_mask": changed(kwargs["attention_mask"])}

    model.transformer_blocks[0].attn.register_forward_pre_hook(change, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=message):
        run(model, inputs("hunyuan"))


def test_a_mask_in_a_model_without_padding_is_refused() -> None:
    model = make("flux")
    sparsify("flux", model)
    with pytest.raises(NotImplementedError, match="windows go with no mask in this model"):
        run(
            model, inputs("flux") | {"joint_attention_kwargs": {"attention_mask": torch.ones(63, 63, dtype=torch.bool)}}
        )


def test_another_model_by_its_layout() -> None:
    class Own(torch.nn.Module):
        """A Wan that the adapter doesn't know."""

        def __init__(self) -> None:
            super().__init__()
            inner = make("wan")
            self.inner, self.layers, self.config = inner, inner.blocks, inner.config

        def forward(self, hidden_states: torch.Tensor, timestep: Any, encoder_hidden_states: Any) -> Any:
            return self.inner(hidden_states, timestep, encoder_hidden_states)

    model, given = Own(), inputs("wan")
    adapter.sparsify(model, layout=adapter.Layout(("layers",), "attn1", ("patch_size",), "none"), **WINDOW)
    got = run(model, given)
    torch.testing.assert_close(got, masked("wan", make("wan"), given), rtol=1e-4, atol=1e-4)


def test_a_layout_that_is_not_the_models() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.config = make("wan").blocks, make("wan").config

        def forward(self, x: torch.Tensor, time: float) -> torch.Tensor:
            return x

    layouts = {
        "Own has no layers": (("layers",), "attn1", ("patch_size",)),
        r"Own has no blocks\.0\.attn with a processor": (("blocks",), "attn", ("patch_size",)),
        r"Own has no blocks\.0\.norm1 with a processor": (("blocks",), "norm1", ("patch_size",)),
        "Own has no patch in its config": (("blocks",), "attn1", ("patch",)),
    }
    for message, wrong in {
        r"blocks of the layout is 'blocks'; it is a tuple of names": ("blocks", "attn1", ("patch_size",), "none"),
        "patch of the layout is 'patch_size'": (("blocks",), "attn1", "patch_size", "none"),
        "text of the layout is 'end'; it is none, first or last": (("blocks",), "attn1", ("patch_size",), "end"),
    }.items():
        with pytest.raises(InputError, match=message):
            adapter.Layout(*wrong)  # type: ignore[arg-type]
    for message, layout in layouts.items():
        with pytest.raises(InputError, match=message):
            adapter.sparsify(Own(), layout=adapter.Layout(*layout, "none"), kernel_size=3)
    model = Own()
    adapter.sparsify(model, layout=adapter.Layout(("blocks",), "attn1", ("patch_size",), "none"), kernel_size=3)
    with pytest.raises(InputError, match="Own was called without hidden_states, which its windows follow"):
        model(torch.zeros(2, 4, 3, 6, 5), 1.0)
    wan = make("wan")
    handle = sparsify("wan", wan, dense_steps=1)
    with pytest.raises(InputError, match="WanTransformer3DModel was called without timestep"):
        run(wan, inputs("wan") | {"timestep": None})
    with pytest.raises(InputError, match=r"hidden_states are \(2, 4, 12, 10\), and the layout's patch \(1, 2, 2\)"):
        run(wan, inputs("wan") | {"hidden_states": torch.zeros(2, 4, 12, 10)})
    with pytest.raises(RuntimeError, match="outside of its model"):  # no refused call leaves a grid behind
        wan.forward(**inputs("wan"))
    handle.remove()


def test_windows_of_later_steps_are_tried_in_the_first_pass() -> None:
    model = make("wan")
    strategy = {"0_0_0": [1, 1, 1], "3_0_0": [1, 2, 5]}
    sparsify("wan", model, schedule=Schedule.from_mask_strategies(strategy, tile=(1, 2, 1)), steps=4)
    with pytest.raises(InputError, match="2 tiles of 2 along axis 1, of 6 tokens"):
        run(model, inputs("wan"))


def test_dense_steps_follow_the_timestep() -> None:
    """Two passes per step, as with guidance; a second image begins where the timestep rises."""
    model = make("wan")
    plain = {step: run(model, inputs("wan", step=step)) for step in (900.0, 600.0, 300.0)}
    handle = sparsify("wan", model, dense_steps=2)
    for _ in range(2):
        for number, step in enumerate(plain):
            for _ in range(2):
                got = run(model, inputs("wan", step=step))
                assert handle.step == number
                assert torch.equal(got, plain[step]) == (number < 2)
    assert "12 forward passes, step 2, " in handle.report()


COSMOS_TIMES = (0.98828, 0.984375, 0.984375, 0.98047)  # as bfloat16 leaves them


def test_steps_that_the_pipeline_tells() -> None:
    """Two passes per step, of which two steps have one value of bfloat16; the second run begins by itself."""
    model = make("wan")
    handle = sparsify("wan", model, dense_steps=2)
    pipe = SimpleNamespace(num_timesteps=len(COSMOS_TIMES))
    tensors = {"latents": torch.zeros(1)}
    for _ in range(2):
        for number, time in enumerate(COSMOS_TIMES):
            for _ in range(2):
                run(model, inputs("wan", step=time))
                assert (handle.step, handle.report().count("dense")) == (number, 2 if number < 2 else 0)
            assert handle.on_step_end(pipe, number, time, tensors) is tensors
        assert ", step 3, " in handle.report()  # the last pass's, not that of the next
    for time in COSMOS_TIMES:
        run(model, inputs("wan", step=time))
    assert handle.step == 2  # by the values alone
    handle.step = 3
    run(model, inputs("wan", step=2.0))  # which rises
    assert handle.step == 3
    with pytest.raises(InputError, match="step is -1; steps count from 0"):
        handle.step = -1


def test_reset_after_a_run_that_was_stopped() -> None:
    """Image to image, from a lower value than where the run before was stopped."""
    model = make("wan")
    handle = sparsify("wan", model, dense_steps=2)
    for told in (False, True):
        for number, time in enumerate((1000.0, 900.0, 800.0)):
            run(model, inputs("wan", step=time))
            if told:
                handle.on_step_end(SimpleNamespace(num_timesteps=9), number, time, {})
        assert handle.report().count("dense") == 0
        handle.reset()
        for number, time in enumerate((600.0, 500.0, 400.0)):
            run(model, inputs("wan", step=time))
            assert (handle.step, handle.report().count("dense")) == (number, 2 if number < 2 else 0)


def test_layers_that_stay_dense() -> None:
    model, given = make("wan", layers=3), inputs("wan")
    handle = sparsify("wan", model, dense_layers=[1], layers=[0, 1])
    run(model, given)
    assert [line.split(":")[1].strip()[:5] for line in handle.report().splitlines()[1:]] == ["33.3%", "dense"]
    by_layer = sparsify("wan", twin := make("wan", layers=3), schedule=Schedule([Pattern(**WINDOW), None, None]))
    torch.testing.assert_close(run(twin, given), run(model, given), rtol=0, atol=0)
    assert by_layer.report().count("dense") == 2


def test_windows_per_head_by_step_and_layer() -> None:
    """A mask strategy of sliding tile attention, in tiles of 2x2x1: windows are those of heads one by one."""
    model, given, tile = make("wan"), inputs("wan", step=900.0), (1, 2, 1)
    strategy = {"0_0_0": [1, 3, 1], "0_0_1": [3, 1, 5], "0_1_0": [3, 3, 5], "0_1_1": [9, 9, 9], "1_0_0": [1, 1, 1]}
    handle = sparsify("wan", model, schedule=Schedule.from_mask_strategies(strategy, tile=tile))
    got = run(model, given)
    assert handle.report().splitlines()[2] == "  1 blocks.1.attn1: dense"  # both of its heads see all
    heads = [Pattern((1, 6, 1), (1, 2, 1)), Pattern((3, 2, 5), (1, 2, 1))]
    outs = []
    for pattern in heads:  # each head's window for both, of which one head's channels are taken
        twin = make("wan")
        sparsify("wan", twin, schedule=Schedule([pattern, None]))
        seen: list[torch.Tensor] = []
        twin.blocks[0].attn1.to_out[0].register_forward_pre_hook(lambda _, args, kept=seen: kept.append(args[0]))
        run(twin, given)
        outs.append(seen[0].unflatten(-1, (2, -1)))
    mine: list[torch.Tensor] = []
    model.blocks[0].attn1.to_out[0].register_forward_pre_hook(lambda _, args: mine.append(args[0]))
    torch.testing.assert_close(run(model, given), got, rtol=0, atol=0)
    want = torch.stack([outs[0][..., 0, :], outs[1][..., 1, :]], -2).flatten(-2)
    torch.testing.assert_close(mine[0], want, rtol=1e-5, atol=1e-5)
    run(model, inputs("wan", step=800.0))
    with pytest.raises(InputError, match="the schedule has 2 steps, and this is step 2"):
        run(model, inputs("wan", step=700.0))


def test_the_neighborhood_processor_of_ltx() -> None:
    """LTX-2.5's decoder attention, beside diffusers' own processor on FlexAttention."""
    torch.manual_seed(0)
    attention = ltx.LTX2VideoVaeNeighborhoodAttention(32, (3, 5, 5), head_dim=16).eval()
    x = torch.randn(1, 4, 6, 7, 32)
    with torch.no_grad():
        want = attention(x)
        attention.set_processor(adapter.NeighborhoodProcessor())
        assert attention.build_block_mask(x) is None
        torch.testing.assert_close(attention(x), want, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes no block_mask"):
        attention(x, block_mask=object())

"""A planted fault: one element, at one step, and nothing of it left afterwards."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from normfree.cli import check_overrides, run_config
from normfree.config import Config, InjectConfig, ModelConfig, OptimConfig
from normfree.diagnostics.inject import Injector, running_modules
from normfree.errors import UserError
from normfree.identity import weights_hash
from normfree.model import Transformer, init_weights
from normfree.rules import validate
from normfree.training.optimizer import build_optimizer

IDX = torch.arange(24).view(2, 12)


def build(**shape):
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=64, **shape))
    init_weights(model, 0)
    optimizer = build_optimizer(model, OptimConfig())
    model(IDX, IDX).sum.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def plant(module, phase="forward", value="nan", step=3, **shape):
    model, optimizer = build(**shape)
    return model, optimizer, Injector(model, optimizer, InjectConfig(step, module, phase, value))


def output_of(model, name):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output))
    model(IDX, IDX)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("value", "test"), [("nan", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)])
def test_one_element_of_the_output_in_the_first_micro_batch_of_the_step(value, test):
    model, _, injector = plant("blocks.1.mlp.fc", value=value)
    for step, micro in ((2, 0), (3, 1), (4, 0)):
        injector.before_forward(step, micro)
        assert output_of(model, "blocks.1.mlp.fc").isfinite().all()
    places = []
    for _ in range(2):
        injector.before_forward(3, 0)
        bad = test(output_of(model, "blocks.1.mlp.fc"))
        assert bad.sum() == 1
        places.append(bad.nonzero().tolist())
    assert places[0] == places[1], "a replay must plant the same element"
    injector.undo()
    assert output_of(model, "blocks.1.mlp.fc").isfinite().all()


def test_planting_at_an_identity_leaves_its_input_alone():
    """The residual stream goes past the norm that is none: it must not get the value too."""
    model, _, injector = plant("blocks.0.norm_1", norm="none")
    injector.before_forward(3, 0)
    assert output_of(model, "drop").isfinite().all()
    injector.before_forward(3, 0)
    assert output_of(model, "blocks.0.norm_1").isnan().sum() == 1


def test_the_gradient_of_an_output():
    model, _, injector = plant("blocks.1.mlp.fc", "backward")
    injector.before_forward(3, 0)
    model(IDX, IDX).sum.backward()
    assert model.blocks[1].mlp.fc.bias.grad.isnan().sum() == 1, "the bias sums the gradient of one column each"
    assert model.blocks[1].mlp.proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_weights_gradients_and_moments_are_put_back(phase):
    name = "blocks.0.attn.proj.weight"
    model, optimizer, injector = plant(name + (".exp_avg_sq" if phase == "optimizer" else ""), phase, "inf")
    weight = model.get_parameter(name)
    injector.before_forward(3, 0)
    if phase == "forward":
        tensor = weight.detach()
        assert tensor.isinf().sum() == 1
        injector.before_forward(3, 1)  # stays for the whole step
    else:
        model(IDX, IDX).sum.backward()
        injector.after_backward(2)
        injector.before_optimizer(2)
        tensor = weight.grad if phase == "backward" else optimizer.state[weight]["exp_avg_sq"]
        assert tensor.isfinite().all()
    before = tensor.clone()
    injector.after_backward(3)
    injector.before_optimizer(3)
    assert tensor.isinf().sum() == 1
    injector.undo()
    assert tensor.isfinite().all()
    if phase != "forward":
        assert tensor.equal(before)
    assert all(p.isfinite().all() for p in model.parameters())
    injector.undo()  # again: nothing happens


def test_nothing_is_attached_without_an_injection():
    model, optimizer = build()
    injector = Injector(model, optimizer, InjectConfig())
    for step in range(3):
        injector.before_forward(step, 0)
        injector.after_backward(step)
        injector.before_optimizer(step)
        injector.undo()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("module", "phase", "meant"),
    [
        ("block.1.mlp.fc", "forward", "'blocks.1.mlp.fc'"),
        ("blocks.1.mlp.fc.weigth", "backward", "'blocks.1.mlp.fc.weight'"),
        ("blocks.1.mlp.fc.weight", "optimizer", "'blocks.1.mlp.fc.weight.exp_avg'"),
        ("wpe", "forward", "wpe.weight"),  # used as a matrix: the module itself never runs
        ("blocks", "forward", "'blocks.1'"),  # a list of blocks, which does not run either
    ],
)
def test_what_the_model_has_not_is_refused_with_the_nearest_name(module, phase, meant):
    with pytest.raises(UserError, match=meant):
        plant(module, phase)


@pytest.mark.parametrize(("phase", "name"), [("backward", "blocks.0.attn.proj"), ("optimizer", "wpe.weight.exp_avg")])
def test_a_wrong_name_shows_the_few_nearest_and_how_to_see_them_all(phase, name):
    with pytest.raises(UserError) as few:
        plant("blocks.1.mlp.fcc", phase)
    assert "'blocks.1.mlp.fc" in str(few.value)
    assert name not in str(few.value)
    assert len(str(few.value)) < 400
    assert "debug.inject.module=list" in str(few.value)
    with pytest.raises(UserError) as every:
        plant("list", phase)
    assert name in str(every.value)


def test_a_moment_before_the_first_update_is_refused():
    with pytest.raises(UserError, match="no optimizer moments"):
        plant("wte.weight.exp_avg", "optimizer", step=0)


def test_running_modules_are_in_the_order_of_execution():
    names = running_modules(build(positions="rotary", norm="none")[0])
    assert names.index("blocks.0.attn.qkv") < names.index("rotary") < names.index("blocks.0.attn.inner_attention")
    assert names[0] == "wte"
    assert names[-1] == "final_norm"


def test_a_compiled_model_has_one_more_variant_at_the_armed_step_and_nothing_else():
    model, _, injector = plant("blocks.1.mlp.act", step=2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    variants, finite = [], []
    for step in range(4):
        injector.before_forward(step, 0)
        compiled(IDX, IDX).sum.backward()
        injector.undo()
        variants.append(counter.frame_count)
        finite.append(all(math.isfinite(p.grad.sum()) for p in model.parameters()))
        model.zero_grad()
    assert variants == [1, 1, 2, 2]
    assert finite == [True, True, False, True]


# -- the setting ------------------------------------------------------------------------------------------------------


def test_the_setting_is_checked_before_anything_is_written(tiny, tmp_path):
    config = tiny(run_dir=str(tmp_path / "run"), **{"debug.inject.step": 1, "debug.inject.module": "blocks.9"})
    with pytest.raises(UserError, match="debug.inject.module"):
        run_config(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("inject", "message"),
    [
        ({"step": 1}, "both step and module"),
        ({"step": 6, "module": "wte"}, "never reached"),
        ({"step": 1, "module": "wte", "value": "zero"}, "debug.inject.value"),
        ({"step": 1, "module": "wte", "phase": "evaluation"}, "debug.inject.phase"),
    ],
)
def test_the_setting_has_rules(tiny, inject, message):
    with pytest.raises(UserError, match=message):
        validate(tiny(**{f"debug.inject.{name}": value for name, value in inject.items()}))


def test_the_setting_on_the_command_line():
    check_overrides(["debug.inject={step:3,module:blocks.1.mlp.fc,phase:forward,value:nan}"], multirun=False)
    check_overrides(["debug.inject.step=3", "debug.inject.module=wte", "debug.inject.value=-inf"], multirun=False)
    with pytest.raises(UserError):
        check_overrides(["debug.inject={stpe:3}"], multirun=False)


def test_a_planted_run_has_a_name_of_its_own_and_others_keep_theirs():
    plain, planted = Config(), Config()
    planted.debug.inject = InjectConfig(3, "wte")
    assert weights_hash(plain) != weights_hash(planted)
    unused = Config()
    unused.debug.inject.phase = "backward"
    assert weights_hash(plain) == weights_hash(unused)

"""The arithmetic behind the speed table: closed forms, and every limit can be missed."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from normfree.config import ModelConfig

SCRIPT = Path(__file__).parents[1] / "experiments" / "speed_report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_report", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["speed_report"] = module
    spec.loader.exec_module(module)
    return module


def row(report: ModuleType, case: str = "512x128", **turns: list[float]) -> dict[str, Any]:
    """A measured case; names of models with `_` for `-`, milliseconds of their turns."""
    models = {name.replace("_", "-"): {"turns_ms": ms, "micro_batch": 512, "gib": 20.5} for name, ms in turns.items()}
    made = {"case": case, "batch": 512, "T": 128, "models": models, "rates": [780e12, 800e12, 790e12]}
    made |= {"flops_per_token": 855_638_016, "kernels": {}, "data_ms": 0.5}
    report.summarize(made)
    return made


def lines(report: ModuleType, *rows: dict[str, Any]) -> list[str]:
    return list(report.limits_table(list(rows)))


def test_flops_of_gpt2_small(report: ModuleType) -> None:
    model = ModelConfig(n_layer=12, n_head=12, n_embd=768, vocab_size=50304)
    matrices = 12 * (4 + 8) * 768**2 + 768 * 50304  # attention, feed-forward, head
    assert matrices == 123_568_128
    assert report.flops_per_token(model, 128) == 6 * matrices + 12 * 12 * 768 * 128
    assert report.flops_per_token(model, 1024) - report.flops_per_token(model, 128) == 12 * 12 * 768 * 896


def test_flops_are_forward_and_backward_of_every_product(report: ModuleType) -> None:
    L, C, V, T = 2, 8, 32, 4
    forward = L * (3 * C * C + C * C + 2 * 4 * C * C + 2 * T * C) + V * C  # multiplications a token
    assert report.flops_per_token(ModelConfig(n_layer=L, n_head=2, n_embd=C, vocab_size=V), T) == 2 * 3 * forward


KERNELS = {
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "matrix products",
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>(Params)": "matrix products",
    "triton_tem_fused_mm_3": "matrix products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "matrix products",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x64": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Traits>": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)": "attention",
    "_entropy_forward": "entropy and counts",
    "_short_forward": "attention",
    "_short_backward": "attention",
    "_long_backward_keys": "attention",
    "_softmax_gradient": "loss",
    "_gradient_product": "matrix products",
    "_summarize_rows": "entropy and counts",
    "_adamw": "optimizer",
    "_adamw_steps": "optimizer",
    "_count": "entropy and counts",
    "triton_per_fused_linalg_vector_norm_4": "entropy and counts",
    "triton_red_fused__to_copy__log_softmax_nll_loss_forward_isfinite_1": "loss",
    "triton_red_fused__to_copy_prepare_softmax_online_7": "loss",
    "triton_poi_fused__log_softmax_backward_data_nll_loss_backward_2": "loss",
    "triton_poi_fused_relu_threshold_backward_12": "element-wise",
    "triton_poi_fused__to_copy_add_gelu_3": "element-wise",
    "triton_red_fused_add_linalg_vector_norm_9": "element-wise",
    "triton_red_fused_add_linalg_vector_norm_native_layer_norm_9": "reductions",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "element-wise",
    "triton_per_fused__to_copy_native_layer_norm_native_layer_norm_backward_3": "reductions",
    "triton_red_fused_sum_14": "reductions",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>": "reductions",
    "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>": "optimizer",
    "void at::native::lpnorm_cleanup<float, NormType::L2>": "optimizer",
    "triton_poi_fused__to_copy_5": "copies and casts",
    "triton_poi_fused_cat_2": "copies and casts",
    "triton_poi_fused__to_copy_transpose_view_5": "copies and casts",
    "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies and casts",
    "Memcpy HtoD (Pinned -> Device)": "copies and casts",
    "Memset (Device)": "memory fills",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>": "memory fills",
    "triton_poi_fused_zeros_1": "memory fills",
    "something_new": "other",
}


@pytest.mark.parametrize(("name", "label"), KERNELS.items())
def test_class_of_a_kernel(report: ModuleType, name: str, label: str) -> None:
    assert report.kernel_class(name) == label


def test_classes_add_up_to_all_kernels(report: ModuleType) -> None:
    times = report.kernel_classes({name: float(i) for i, name in enumerate(KERNELS)})
    assert set(times) == set(report.KERNEL_CLASSES)
    assert sum(times.values()) == sum(range(len(KERNELS)))


def test_a_file_keeps_the_classes_of_all_kernels_and_the_longest_by_short_names(report: ModuleType) -> None:
    kernels = {f"{i:03} triton_red_{'x' * 200}_{half}": 1000.0 - i for i in range(2 * report.LONGEST) for half in "ab"}
    row = report.kept({"case": "512x128", "kernels": {"none": kernels}})
    assert list(row["kernels"]["none"].values()) == [2 * (1000.0 - i) for i in range(report.LONGEST)]
    assert {len(name) for name in row["kernels"]["none"]} == {report.NAME}
    assert sum(row["kernel_classes"]["none"].values()) == sum(kernels.values())


def test_ratio_is_taken_round_by_round(report: ModuleType) -> None:
    """A machine that slows down by half from round to round changes nothing."""
    slower = row(report, none=[100, 200, 400], peer_none=[120, 240, 480])
    assert report.ratio(slower, "none", "peer-none") == pytest.approx(1.2)


def test_mfu_and_tokens(report: ModuleType) -> None:
    model = row(report, none=[90, 95, 94])["models"]["none"]
    assert model["ms"] == 94
    assert model["tokens_per_second"] == pytest.approx(65536 / 0.094)
    assert model["mfu"] == pytest.approx(855_638_016 * 65536 / 0.094 / 790e12)


def test_limits_are_met_and_missed(report: ModuleType) -> None:
    measured = row(report, ln=[106], none=[94], peer_ln=[117], peer_none=[107], original=[360])
    text = {tuple(part.strip() for part in (line[12:40], line[41:73])): line for line in lines(report, measured)}
    ours = report.LABELS["none"]
    assert ">= 1.15 MISSED" in text[ours, report.LABELS["peer-none"]]
    assert ">= 3.80 met" in text[ours, report.LABELS["original"]]
    assert ">= 1.10 met" in text[report.LABELS["ln"], report.LABELS["peer-ln"]]
    assert ">= 1.25 MISSED" in text[ours, report.LABELS["peer-ln"]]
    said = "\n".join(lines(report, measured))
    assert "no norm + ReLU: MFU 0.755, wanted >= 0.66: met" in said
    assert "no norm + ReLU: 20.5 GiB, wanted <= 20: MISSED" in said
    assert "data loading 0.53 % of a step, wanted <= 1: met" in said


def test_every_wanted_ratio_has_a_case(report: ModuleType) -> None:
    cases = [case for wanted in report.RATIOS.values() for case in wanted]
    assert sorted(set(cases)) == ["512x128", "64x1024", "cpu"]
    assert len(cases) == 9
    assert all(name in report.LABELS for pair in report.RATIOS for name in pair)


def test_table_lines_up(report: ModuleType) -> None:
    measured = row(report, ln=[106], none=[94], ln_plain=[110], none_plain=[100], peer_ln=[117], peer_none=[107])
    alone = row(report, case="355m", none=[61.5])
    head, *found = [line for line in lines(report, measured, alone) if "wanted <" not in line and ": MFU" not in line]
    assert len({len(line) for line in (head, *found)}) == 1
    assert len(found) == 7  # the plain variants stand on the right-hand side only
    assert found[-1].split()[-4:] == ["-", "1,065,626", "1.154", "20.5"]
    profiled = measured | {"kernels": {"ln": {"_entropy_forward": 1.0, "gemm": 2.0}, "none": {"gemm": 3.0}}}
    for table in (report.models_table(measured), report.classes_table(profiled)):
        head, *found = table
        assert len(found) > 5
        assert len({len(line.rpartition("  ")[0] if "model" in head else line) for line in found}) == 1
    assert [line.split()[-2:] for line in found if "sum" in line] == [["3.00", "3.00"]]


def test_without_a_rate_there_is_no_utilisation(report: ModuleType) -> None:
    """The CPU's case: no FLOP/s, no memory."""
    made = {"case": "cpu", "batch": 16, "T": 128, "models": {}, "operators": {}, "data_ms": 0.2}
    made["models"] = {name: {"turns_ms": [ms], "micro_batch": 16} for name, ms in (("none", 100), ("peer-none", 120))}
    report.summarize(made)
    said = "\n".join([*lines(report, made), *report.models_table(made), *report.classes_table(made)])
    assert "1.200  >= 1.30 MISSED" in said
    assert "20,480" in said
    assert "MFU 0" not in said


def test_the_rate_that_the_card_sustains_stands_beside(report: ModuleType) -> None:
    made = row(report, none=[100.0]) | {"sustained_rates": [600e12, 660e12, 661e12]}
    (line,) = [line for line in lines(report, made) if "sustained" in line]
    share = made["models"]["none"]["mfu"] * 790 / 660
    assert f"790 TFLOP/s, of which MFU is a share; 660 sustained, of which ours are {share:.3f}" in line


@pytest.mark.parametrize("case", ["512x128", "64x1024", "cpu"])
def test_the_readme_quotes_the_results(report: ModuleType, case: str) -> None:
    root = SCRIPT.parents[1]
    kept = json.loads((root / "experiments" / "results" / "speed" / f"{case}.json").read_text())["cases"][0]
    label = {"cpu": "two CPU cores"}.get(case, f"124M, {case.replace('x', ' x ')}")
    (line,) = [text for text in (root / "README.md").read_text().splitlines() if text.startswith("|") and label in text]
    quoted = re.findall(r"\d\.\d+", line)
    pairs = [("ln", "peer-ln"), ("none", "peer-none"), ("none", "peer-ln"), ("none", "original")][: len(quoted)]
    assert len(quoted) >= 2
    for (ours, against), text in zip(pairs, quoted, strict=True):
        assert f"{report.ratio(kept, ours, against):.{len(text) - 2}f}" == text, (ours, against)

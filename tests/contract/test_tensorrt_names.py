"""Every name of TensorRT that our source uses is in the bindings; none that TensorRT 11 dropped."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import compressor

pytestmark = pytest.mark.tensorrt

CHECKOUT = Path(compressor.__file__).parents[1]
DEVICE = CHECKOUT / "compressor" / "device"
PACKAGES = ("compressor", "exporters", "cli")
SOURCES = [path for name in PACKAGES for path in (CHECKOUT / name).rglob("*.py")]

CLASS_OF_VARIABLE = {
    "builder.py": {
        "builder": "Builder",
        "network": "INetworkDefinition",
        "config": "IBuilderConfig",
        "cache": "ITimingCache",
    },
    "build_network.py": {
        "parser": "OnnxParser",
        "error": "ParserError",
        "network": "INetworkDefinition",
        "tensor": "ITensor",
        "profile": "IOptimizationProfile",
        "builder": "Builder",
        "config": "IBuilderConfig",
    },
    "engine.py": {
        "engine": "ICudaEngine",
        "context": "IExecutionContext",
        "inspector": "EngineInspector",
        "self._context": "IExecutionContext",
        "self._runtime": "Runtime",
    },
}
"""What the variables of these files hold, by the names that stand there."""

ONLY_IN_RTX = {
    "ComputeCapability",
    "ComputeCapability.__members__",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}

REMOVED_IN_11 = """
    EXPLICIT_BATCH OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS REJECT_EMPTY_ALGORITHMS
    WEIGHTLESS IInt8Calibrator IInt8EntropyCalibrator IInt8EntropyCalibrator2 IInt8MinMaxCalibrator
    IInt8LegacyCalibrator CalibrationAlgoType QuantizationFlag IAlgorithm IAlgorithmSelector
    int8_calibrator set_calibration_profile get_calibration_profile set_quantization_flag
    get_quantization_flag clear_quantization_flag quantization_flags algorithm_selector
    platform_has_fast_fp16 platform_has_fast_int8 platform_has_tf32 precision_is_set
    reset_precision set_output_type output_type_is_set reset_output_type set_dynamic_range
    reset_dynamic_range dynamic_range supports_model parse_with_weight_descriptors
    device_memory_size create_execution_context_without_device_memory has_implicit_batch_dimension
    PROFILE_SHARING_0806 IStreamReader max_workspace_size build_engine_with_config execute_async_v2
""".split()
REMOVED_MEMBERS = (
    r"BuilderFlag\.(FP16|BF16|INT8|FP8|INT4|FP4)\b|TacticSource\.(CUBLAS|CUBLAS_LT|CUDNN)\b"
)


def chain_of(node):
    """`a.b.c` as text; None for what is no chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = chain_of(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def names_used(path):
    """(CLASS.name or name) of TensorRT in a file, from `trt.X.Y` and from known variables."""
    known = CLASS_OF_VARIABLE.get(path.name, {}) if path.parent == DEVICE else {}
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        chain = chain_of(node) if isinstance(node, ast.Attribute) else None
        if chain is None:
            continue
        if re.match(r"(trt|self\._trt|tensorrt\.module)\.", chain):
            used.add(
                chain.removeprefix("self._").removeprefix("trt.").removeprefix("tensorrt.module.")
            )
        for variable, kind in known.items():
            if chain.startswith(f"{variable}."):
                used.add(f"{kind}.{chain.removeprefix(f'{variable}.').partition('.')[0]}")
    return used


def all_names_used():
    return sorted(set().union(*(names_used(path) for path in SOURCES)))


def test_the_collector_sees_what_the_builder_does():
    """Or an empty list would pass."""
    names = all_names_used()
    for name in (
        "Builder",
        "BuilderFlag.TF32",
        "BuilderFlag.EXCLUDE_LEAN_RUNTIME",
        "Builder.create_network",
        "HardwareCompatibilityLevel.AMPERE_PLUS",
        "IBuilderConfig.builder_optimization_level",
        "IBuilderConfig.progress_monitor",
        "ICudaEngine.get_tensor_profile_shape",
        "IExecutionContext.execute_async_v3",
        "IProgressMonitor",
        "ITimingCache.serialize",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "OnnxParser.get_error",
        "ParserError.node_operator",
        "Runtime.deserialize_cuda_engine",
        "EngineInspector.get_engine_information",
        "DataType.UINT8",
    ):
        assert name in names
    assert len(names) > 50


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_every_name_is_in_the_bindings(flavour):
    try:
        trt = importlib.import_module(flavour)
    except (ImportError, OSError) as error:
        pytest.skip(f"{flavour} is not here: {error}")
    lacking = []
    for name in all_names_used():
        if flavour == "tensorrt" and name in ONLY_IN_RTX:
            continue
        value = trt
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            lacking.append(name)
    assert lacking == []


def test_no_name_that_tensorrt_11_dropped():
    found = []
    for path in SOURCES:
        text, place = path.read_text(), path.relative_to(CHECKOUT).as_posix()
        found += [(place, name) for name in REMOVED_IN_11 if re.search(rf"\b{name}\b", text)]
        found += [(place, match[0]) for match in re.finditer(REMOVED_MEMBERS, text)]
    assert found == []


def test_what_the_bindings_say_of_themselves():
    """Strong typing is what TensorRT 11 always does, and TF32 is on until it is cleared."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert "Strongly typed mode is always enabled" in trt.NetworkDefinitionCreationFlag.__doc__
    assert "Enabled by default" in trt.BuilderFlag.__doc__

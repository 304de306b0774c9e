"""A GGUF file's model in bfloat16, for `benchmarks.engine --llama-cpp-gguf`.

    python -m benchmarks.bf16_gguf SOURCE TARGET

Metadata are copied, matrices become bfloat16, vectors float32, as llama.cpp's own converter writes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf


def write_bf16(source: Path, target: Path) -> int:
    """Write `target` and give its number of tensors. Raises OSError, ValueError."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
            continue  # the writer's own
        if field.name == gguf.Keys.General.FILE_TYPE:
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, sub_type=field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        )
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType.BF16 if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(reader.tensors)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bf16_gguf", description=__doc__)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="GGUF file, quantised or not")
    parser.add_argument("target", type=Path, metavar="TARGET", help="file to write")
    parsed = parser.parse_args()
    print(f"{parsed.target}: {write_bf16(parsed.source, parsed.target)} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

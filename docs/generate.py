"""What the pages say of formats, encodings and files, taken from the code: docs/formats.md, docs/api.md, the README's table, the lists in docs/architecture.md.

`python docs/generate.py` writes them; with `--check` it writes nothing and exits with 1 if one of them is stale.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import moeglot
from moeglot.codings import CODINGS
from moeglot.codings.coding import Coding
from moeglot.dtypes import DTYPES, WEIGHT_DTYPES
from moeglot.encodings import NAMES
from moeglot.encodings.mxfp4 import RULES
from moeglot.encodings.plain import Plain
from moeglot.family import Activation, Family
from moeglot.format import Format
from moeglot.formats import FAMILIES, PLAIN, variants
from moeglot.layout import Stored

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "moeglot"
ENVIRONMENTS = ROOT / "tests" / "environments"

RULE_MEANINGS = {
    "ceil": "the smallest power of two under which nothing overflows, ceil(log2(amax / 6))",
    "floor": "floor(log2(amax)) - 2; what then is above 6 becomes 6",
    "even": "as floor, with amax rounded to two bits of significand first",
}


def main() -> int:
    """Write, or with --check compare; the exit status."""
    pages = {
        ROOT / "docs" / "formats.md": formats_page(),
        ROOT / "docs" / "api.md": api_page(),
        ROOT / "README.md": between(ROOT / "README.md", {"formats": table(*readme_table())}),
        ROOT / "docs" / "architecture.md": between(ROOT / "docs" / "architecture.md", {"files": table(*file_table()), "imports": import_rows()}),
    }
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale: run `python docs/generate.py`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


# --- Markdown ------------------------------------------------------------------------------------------------------------------------


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def between(path: Path, texts: Mapping[str, str]) -> str:
    """The file with each text between the markers of its name."""
    page = path.read_text(encoding="utf-8")
    for name, text in texts.items():
        before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if page.count(before) != 1 or page.count(after) != 1:
            raise SystemExit(f"{path.name} needs {before.strip()} and {after} once, each on its own line")
        head, rest = page.split(before)
        page = head + before + text + "\n" + after + rest.split(after)[1]
    return page


def code(text: str) -> str:
    return f"`{text}`"


def link(url: str) -> str:
    return f"[{url.removeprefix('https://').split('/')[0]}]({url})"


# --- what a spec says ----------------------------------------------------------------------------------------------------------------


def versions(package: str) -> list[str]:
    """The versions of a package that the environments of the tests pin, in order."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(ENVIRONMENTS.glob("*.txt"))]
    found = {match for text in texts for match in re.findall(rf"^{package}==(\S+)$", text, re.MULTILINE)}
    return sorted(found, key=lambda version: [int(n) for n in version.split(".")])


EVERYWHERE = ("gpt-oss", "qwen3-moe", "mixtral")
"""Families whose formats the tests have every version of transformers read; the others are read by the newest."""


MLX = ("kimi-k2", "bailing-moe", "step3p5")
"""Families that transformers does not know and mlx-lm computes with in the tests."""


DOCUMENTED = {
    "vLLM": "what vLLM documents; its own code is not run",
    "Megatron-Core with transformer-engine": "what Megatron-Core with transformer-engine documents; its own code is not run",
    "nothing that we know": "the source of the script that writes it; that code is not run",
}
"""Readers whose code no test runs -> what stands for it."""


def checked_against(form: Format) -> str:
    """Which real library the tests let read this format and compute with it."""
    if form.family.unverified:
        return f"nothing: {form.family.unverified}"
    if form.reads == "openai's gpt_oss":
        return f"openai's gpt_oss {', '.join(versions('gpt-oss'))}"
    if form.reads == "unsloth":
        return f"bitsandbytes {versions('bitsandbytes')[-1]} and transformers {versions('transformers')[-1]}; its own code is not run"
    if form.reads == "AMD's Quark":
        return f"amd-quark {versions('amd-quark')[-1]}"
    if form.reads == "Megatron-Core":
        return f"megatron-core {', '.join(versions('megatron-core'))}"
    if form.reads == "transformers 5.5":
        return "transformers " + ", ".join(v for v in versions("transformers") if v.startswith("5.5."))
    if form.reads in DOCUMENTED:
        return DOCUMENTED[form.reads]
    if form.reads not in ("any transformers", "transformers 5"):
        raise SystemExit(f"say in docs/generate.py what {form.name} is checked against, which {form.reads} reads: a branch of checked_against, or DOCUMENTED")
    if form.family.name in MLX:
        return f"mlx-lm {versions('mlx-lm')[-1]}"
    if form.family.name not in EVERYWHERE:
        return f"transformers {versions('transformers')[-1]}"
    return "transformers " + ", ".join(v for v in versions("transformers") if form.reads == "any transformers" or v.startswith("5."))


def encoding(line: Stored) -> str:
    if isinstance(line.encoding, Plain):
        return line.encoding.name if line.encoding.dtype else "any float type"
    parts = ", ".join(f"`{line.names[part.name]}` {'/'.join(part.dtypes)}" for part in line.encoding.parts)
    return f"{line.encoding.name}: {parts}"


def activation(of: Activation) -> str:
    key = f"{code(of.function[0])} of config.json, by default {of.function[1]}" if of.function[0] else of.function[1]
    numbers = "".join(f", {name} = {code(key)} (default {default:g})" for name, (key, default) in of.numbers.items())
    kinds = {
        "swiglu": "`act(gate) * up`",
        "ungated": "`act(up)`, without a gate",
        "clamped-swiglu": "`gate * sigmoid(alpha * gate) * (up + 1)`, with gate and up clamped to limit",
        "limited-swiglu": "`act(gate) * up`, with gate and up clamped to limit",
        "capped-swiglu": "`act(gate) * up`, with act(gate) and up clamped to limit",
        "softcapped-swiglu": "`cap(gate) * sigmoid(gate) * cap(up)`, where cap(x) = c * tanh(x / c)",
    }
    if of.kind not in kinds:
        raise SystemExit(f"say in docs/generate.py what {of.kind!r} computes")
    return kinds[of.kind] + ("" if of.kind in ("clamped-swiglu", "softcapped-swiglu") else f", act is {key}") + numbers


# --- the pages -----------------------------------------------------------------------------------------------------------------------


def readme_table() -> tuple[list[str], list[list[str]]]:
    rows = [[code(coding.name), coding.about, judges(coding)] for coding in CODINGS]
    return ["quantized variant", "what it is", "checked against"], rows


def judges(coding: Coding) -> str:
    return ", ".join(f"{package} {versions(package)[-1]}" for package in coding.judges)


def coverage() -> tuple[list[str], list[list[str]]]:
    """One row a layout: whose experts, how they lie, in which encodings, and what verified it."""
    rows = []
    for form in PLAIN:
        native = " and ".join(sorted({line.encoding.name for line in form.stored if not isinstance(line.encoding, Plain)}))
        encodings = native or ("any float type, and every variant below" if variants(form) else "any float type")
        rows.append([f"[{form.family.name}](#{form.family.name.replace('.', '')})", code(form.name), encodings, form.reads, checked_against(form)])
    return ["family", "format", "encodings", "read by", "verified by"], rows


def file_table() -> tuple[list[str], list[list[str]]]:
    rows = []
    for path in sorted(SOURCES.rglob("*.py"), key=lambda path: (path.parent != SOURCES, path)):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring:
            raise SystemExit(f"{path}: no docstring")
        first = docstring.split("\n")[0].replace("|", "\\|")
        rows.append([code(path.relative_to(SOURCES).as_posix()), first])
    return ["file", "its first line"], rows


def import_rows() -> str:
    """The rows of tests/test_architecture.py, as one code block."""
    tree = ast.parse((ROOT / "tests" / "test_architecture.py").read_text(encoding="utf-8"))
    layers = next(node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS")
    assert isinstance(layers, ast.Tuple)
    rows = [", ".join(ast.literal_eval(name) for name in row.elts) for row in layers.elts if isinstance(row, ast.Set)]
    return "```\n" + "\n".join(rows) + "\n```"


def api_page() -> str:
    """docs/api.md: every public name, with what its docstring says."""
    named = {name: getattr(moeglot, name) for name in moeglot.__all__ if not name.startswith("_")}
    errors = {name: value for name, value in named.items() if isinstance(value, type) and issubclass(value, Exception)}
    others = sorted((name for name in named if name not in errors), key=lambda name: (isinstance(named[name], type), name))
    head = """# In Python

This page is generated from the docstrings by `docs/generate.py`. Importing `moeglot` does not import torch; that waits until a number is read.
Letters in brackets are axes: `e` expert, `h` hidden, `i` intermediate, `r` rank; [Concepts](concepts.md#axes-have-letters) has more.
"""
    told = [[code(name), (inspect.getdoc(value) or "").split("\n")[0]] for name, value in errors.items()]
    tail = f"\n## What is refused\n\n[What it refuses](refusals.md) shows the messages.\n\n{table(['exception', 'when'], told)}\n"
    return head + "".join(_described(f"moeglot.{name}", named[name]) for name in others) + tail


def _described(name: str, value: Any) -> str:
    said = re.sub(r"(?<!\n)\n(?=(`\w+`[^\n`]*)+:|Raises )", "\n\n", str(inspect.getdoc(value)))
    text = f"\n## {name}\n\n```python\n{_signature(name.rpartition('.')[2], value)}\n```\n\n{said}\n"
    inner = vars(value).items() if isinstance(value, type) else ()
    members = [(shape.format(one), member) for one, member in inner if not one.startswith("_") and (shape := _member(member))]
    return text + "".join(f"\n- {code(shape)}: {' '.join(str(inspect.getdoc(member)).split())}" for shape, member in members) + "\n" * bool(members)


def _member(member: Any) -> str:
    """How a public method or attribute with a docstring is written, "" for what has none of its own."""
    if isinstance(member, property | cached_property):
        return "{}" if inspect.getdoc(member) else ""
    return "{}" + _arguments(member).replace("self, ", "").replace("self", "") if inspect.isfunction(member) and inspect.getdoc(member) else ""


def _signature(name: str, value: Any) -> str:
    return f"{'class ' * isinstance(value, type)}{name}{_arguments(value)}"


def _arguments(value: Any) -> str:
    """A call's arguments as the source writes them, one on each line where they are long."""
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(value)))
    text = re.sub(r"<factory>", "...", text).removesuffix(" -> None") if isinstance(value, type) else text
    inner, _, after = text[1:].rpartition(")")
    return text if len(text) < 120 else "(\n" + "".join(f"    {one},\n" for one in re.split(r", (?=\*|\w+: )", inner)) + ")" + after


SERVERS = (
    "https://github.com/vllm-project/vllm/tree/main/vllm/model_executor/layers/quantization",
    "https://github.com/sgl-project/sglang/tree/main/python/sglang/srt/layers/quantization",
)


def formats_page() -> str:
    """docs/formats.md."""
    head = """# Formats

This page is generated from the specs by `docs/generate.py`. `moeglot formats` prints the same, and `moeglot formats --json` for programs.

A format is one producer's complete way to store the experts of one family. Each row of its table is one stored tensor: the
template of its key, the roles it holds, its axes and its encoding. The letters are explained in [Concepts](concepts.md):
`e` expert, `h` hidden, `i` intermediate, `p` which of the roles.

"""
    plain = sum(not family.unverified for family in FAMILIES)
    overview = f"""{len(FAMILIES)} families in {len(PLAIN)} layouts; real modules of {plain} of these families compute in the tests what moeglot reads.

{table(*coverage())}

"Read by" is the software that loads such a folder. "Verified by" is the real library, by version, whose own code loads checkpoints of this format
in the tests, with H = I, H = 2I and neither: each expert must compute the same as moeglot's reading of it, and the model that is loaded from what moeglot
writes the same as the original, to a relative error of 1e-5 in float32. With openai's gpt_oss the matrices must be equal bit for bit.
The checkpoints of these tests are small and random, but for two trained ones; full-size releases are not converted in the tests.

## Quantized variants

Where every matrix of a layout lies `[out, in]`, the layout exists with its matrices quantized too: `qwen3-moe/hub+fp8-block`.
`--encode fp8-block` with `--to qwen3-moe/hub` means the same. What is no expert is carried as it is where the quantization stays, and decoded with the experts
where it goes.

{table(*readme_table())}

{table(*parts_table())}

### Servers of GPTQ, AWQ and AutoRound

Read in the source of vLLM ([auto_gptq.py, auto_awq.py, auto_round.py, moe_wna16.py]({SERVERS[0]})) and SGLang
([gptq, awq, auto_round.py]({SERVERS[1]})); neither is run in the tests.

| variant | vLLM | SGLang |
| --- | --- | --- |
| `gptq`, symmetric, `checkpoint_format` gptq | 4 or 8 bits | 4 or 8 bits; experts of a layer that are left alone are not looked for |
| `gptq` with zero points | refused; `moe_wna16`, if asked for, adds one to each zero point, also to those of `gptq_v2`, which need none | refused for experts |
| `awq` | yes, with `zero_point` true | yes, with `zero_point` true |
| `auto-round` as `auto_round:auto_gptq` or `auto_round:auto_awq` | yes | yes |
| `auto-round` as `auto_round:gptqmodel` | refused | refused |

- What is made from floats is written as both read it: `gptq` and `auto-round` symmetric, zero points less one; `awq` with zero points.
- Numbers that have zero points (AWQ, asymmetric GPTQ and INT4) keep them. For a server, `--to FORMAT+awq` is their place: `gptq` and `auto-round` store them as
  they are (`gptq_v2`, `auto_round:gptqmodel`), because a zero point of 0 cannot be stored less one.
- AWQ has no `g_idx` and 4 bits alone, and AutoRound has no `desc_act`: GPTQ's numbers in act-order, and to AWQ those of 8 bits, are encoded anew.
- What is left in floats is listed under the names that these servers ask for, too: the module that holds a layer's experts, and `qkv_proj` or `gate_up_proj`.
- transformers 5.23 goes by `checkpoint_format` (AWQ: `version`) before `format`, GPTQModel by `format`, and by a quantize_config.json before config.json: a
  folder in which these disagree is refused.
"""
    return head + overview + "".join(_family(family) for family in FAMILIES) + _encodings()


def parts_table() -> tuple[list[str], list[list[str]]]:
    """What each variant calls its tensors."""
    rows = []
    for coding in CODINGS:
        parts = {part.name: "/".join(part.dtypes) for part in coding.encoding.parts}
        names = [f"{code(suffix)} {parts.get(part, 'if there')}" for part, suffix in coding.linear.items()]
        rows.append([code(coding.name), ", ".join(names), ", ".join(code(suffix or "(the name alone)") for suffix in coding.stacked.values())])
    return ["variant", "in place of `.weight`", "after the name of a stacked tensor"], rows


def _family(family: Family) -> str:
    sizes = ", ".join(f"`{letter}` = {' or '.join(map(code, keys))}" for letter, keys in family.sizes.items())
    facts = [
        f"- config.json: `model_type` is {' or '.join(map(code, family.model_types))}; sizes are {sizes}",
        f"- an expert computes: {activation(family.activation)}",
        f"- where that is from: {link(family.source)}",
        *([f"- **unverified**: {family.unverified}"] if family.unverified else []),
    ]
    return f"\n## {family.name}\n\n" + "\n".join(facts) + "\n" + "".join(_format(form) for form in PLAIN if form.family == family)


def _format(form: Format) -> str:
    rows = [[code(line.key), ", ".join(line.roles), code(line.axes), encoding(line)] for line in form.stored]
    facts = f"{form.about[0].upper() + form.about[1:]}. Read by {form.reads}. Checked against {checked_against(form)}. Producer's source: {link(form.source)}."
    text = f"\n### {form.name}\n\n{facts}\n\n" + table(["key", "roles", "axes", "encoding"], rows) + "\n"
    if form.config.quantization:
        text += f'\nIts config.json has `quantization_config.quant_method = "{form.config.quantization["quant_method"]}"`.\n'
    if form.config.only:
        text += "\nIts config.json has keys of its own: " + ", ".join(map(code, form.config.names.values())) + ".\n"
    if form.dense:
        named = [[code(line.key), " + ".join(map(code, line.hub))] for line in form.dense]
        text += "\nTensors that are not experts and have other names here:\n\n" + table(["here", "on the Hub"], named) + "\n"
    return text


def _encodings() -> str:
    rows = [[code(f"mxfp4:{name}"), RULE_MEANINGS[scale], "away from zero" if ties == "away" else "to even"] for name, (scale, ties) in RULES.items()]
    others = ", ".join(code(name) for name in NAMES if not name.startswith("mxfp4") and name not in {DTYPES[dtype].torch_name for dtype in WEIGHT_DTYPES})
    return f"""
## Encodings

`--encode` takes {", ".join(code(DTYPES[name].torch_name) for name in WEIGHT_DTYPES)} for formats that store any float type, `mxfp4` or `mxfp4:RULE`, and
{others}.
A target that is plain becomes its quantized variant. Numbers that were coded in an encoding before get the scales that they had, so that every value returns;
blocks whose scale the values do not show are counted in the certificate.

A rule says how MXFP4's scale of a group is chosen from its largest magnitude (amax), and how a value halfway between two codes is rounded. It matters only when
numbers are encoded: the rule is not in the file, and every rule is decoded alike. `mxfp4` alone is `mxfp4:openai`.

{table(["name", "scale of a group", "ties"], rows)}

What the tests compare, both ways and bit for bit unless said otherwise:

- MXFP4: transformers, compressed-tensors {versions("compressed-tensors")[-1]} and torchao {versions("torchao")[-1]}, each under its own rule.
  compressed-tensors drops the sign of zero. The rule `openai` is taken from the source of triton_kernels; its encoder is not run in the tests.
- FP8: compressed-tensors and torchao write the same bytes; transformers' scales are ours to one unit in the last place.
- NVFP4: ModelOpt {versions("nvidia-modelopt")[-1]} and compressed-tensors write the same bytes, but for the sign of zero. transformers 5.23 loads such experts
  without their global scale; `inspect` says so.
- MXFP8: ModelOpt writes the same bytes, but for the scale of a group of zeros. compressed-tensors chooses some scales half as large and clips, so only what
  is stored is compared: each decodes the other's to the same bits.
- INT4, with zero points and without: compressed-tensors writes the same bytes.
- MXFP4 and FP8 as AMD's Quark {versions("amd-quark")[-1]} stores them: each decodes the other's to the same bits.
- NF4 and FP4: bitsandbytes {versions("bitsandbytes")[-1]} writes the same bytes, plain and nested.
- Whole checkpoints: transformers {versions("transformers")[-1]} loads what moeglot quantizes (FP8 by block, channel and tensor, MXFP4, INT4) and holds the
  numbers that moeglot decodes, where each expert has matrices of its own. On a CPU it decodes no stacked experts (bitsandbytes' apart): it warns of unexpected
  tensors and computes with codes, or with random experts. `inspect` says so, and `moeglot.load` loads them.
"""


if __name__ == "__main__":
    sys.exit(main())

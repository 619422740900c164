"""The points of scaling.py: parameters, tokens, FLOPs and loss of each run of a study, or of each row of a table.

A table is a CSV (commas, semicolons or tabs), JSON (a list of objects, or an object of lists) or JSON lines, as others
publish them or as wandb exports them. COLUMN_NAMES are the names that are known; --columns=loss:val,params:N gives others.
"""

import collections
import csv
import functools
import io
import json
import math
import statistics
from pathlib import Path

from runs import ROOT, read_rows, same_conditions

from common.files import parse_json, read_json
from configurator import UserError, check_choice, read_keys

AXES = ("n_embd", "n_layer", "block_size", "data_fraction", "tokens", "params", "flops")
COLUMN_NAMES = {  # in lower case, the first that is there is taken
    "loss": "loss,l,val_loss,final_val_loss,validation loss,validation_loss,val/loss,eval/loss,eval_loss,test_loss,final_loss,val_bpb",
    "params": "params,n,num_params,nparams,n_parameters,parameters,model size,model_parameters,n_params,model_size,params_total,non_embedding_params",
    "tokens": "tokens,d,tokens seen,tokens_seen,ntokens,d_tokens,training tokens,num_tokens,tokens_trained,train_tokens,n_tokens,total_tokens,training_tokens",
    "flops": "flops,c,training flop,training flops,train_flops,total_flops,compute,training_flops,flops_budget",
}
# Keys that follow from the size of a model or the length of its training. Runs may differ in them within one fit.
SIZE_KEYS = set(
    "depth n_layer n_head n_kv_head n_embd mlp_hidden block_size data_fraction batch_size gradient_accumulation_steps "
    "total_batch_tokens warmup_iters lr_decay_iters max_iters max_epochs max_flops max_minutes".split()
)
SET_BY_DEPTH = {"head_lr", "weight_decay", "tokens_per_step"}  # --depth chooses them for each size
COUNTS = ("all", "non_embedding")  # what N counts; without the tables of tokens and positions, as Kaplan does
FLOPS = ("measured", "6ND")  # as a run or a column says, or 6 per parameter and token


def read_points(sources: str, columns: str, count: str, flops: str, nuisance: list[str], mixed: bool) -> list[dict]:
    """Points with params, tokens, flops and loss, and for runs also their sizes, seed and kind.

    sources: as --results of scaling.py, whose other keys these are too. Points without a finite loss are left out, with a line.
    """
    check_choice("count", count, COUNTS)
    check_choice("flops", flops, FLOPS)
    points, rows, declared = [], [], list(nuisance)
    for source in filter(None, sources.split(",")):
        if is_table(source):
            points += read_table(Path(source), columns, flops)
        else:
            rows += [row for row in read_rows(source) if row.get("final_val_loss") is not None]
            declared += read_json(Path(source) / "sweep_summary.json").get("nuisance", [])
    rows = rows if mixed else same_conditions(rows, "--mixed=True fits them too")
    points += [run_to_point(row, count, flops, set(declared)) for row in rows]
    finite = [p for p in points if math.isfinite(p["loss"])]
    if len(finite) < len(points):
        print(f"left out: {len(points) - len(finite)} runs whose loss is not finite")
    if not finite:
        raise UserError(f"--results={sources}: no points there: no finished run, or a table with only a header")
    return best_of_nuisance(select_kind(finite))


def describe_units(points: list[dict], count: str, flops: str) -> str:
    """What N counts and what FLOPs are, in words. Of a table, N is what its authors counted."""
    tables = "the tables of tokens and positions"
    counted = {"all": f"with {tables}", "non_embedding": f"without {tables}"}
    measured = {"measured": "as measured", "6ND": "6 per parameter and token"}
    if not any("kind" in point for point in points):
        counted, measured = (
            dict.fromkeys(COUNTS, "as in the table"),
            measured | {"measured": "as in the table, or 6 N D"},
        )
    return f"N: {counted[count]}; FLOPs: {measured[flops]}"


# -----------------------------------------------------------------------------
# Runs


def run_to_point(row: dict, count: str, flops: str, nuisance: set[str]) -> dict:
    """The point of a run, with its kind (what may not differ within one fit) and the values of its nuisance keys."""
    config = parse_json((Path(row["path"]) / "config.json").read_text(encoding="utf-8"))
    if unknown := sorted(nuisance - config.keys()):
        raise UserError(f"--nuisance={unknown}: train.py has no such key")
    per_step = config["batch_size"] * config["gradient_accumulation_steps"] * config["block_size"]
    kind = {key: config[key] for key in kind_keys() if key in config} | {"tokens_per_step": per_step}
    by_size = SET_BY_DEPTH if config.get("depth") else set()
    if nuisance & {"batch_size", "gradient_accumulation_steps"}:
        by_size = by_size | {"tokens_per_step"}
    point = {key: config[key] for key in ("n_embd", "n_layer", "block_size", "data_fraction", "seed")}
    point["kind"] = ", ".join(f"{key}={value}" for key, value in kind.items() if key not in nuisance | by_size)
    point["nuisance"] = {key: config[key] for key in sorted(nuisance)}
    params = row.get("params") or row["model_parameters"]
    if count == "non_embedding":
        if "embedding_parameters" not in row:
            raise UserError(f"--count=non_embedding: {row['path']}/results.json has no embedding_parameters")
        params -= row["embedding_parameters"]
    numbers = dict(params=params, tokens=row["tokens"], flops=row["train_flops"], loss=row["final_val_loss"])
    point |= {key: float(value) for key, value in numbers.items()}
    return point | ({"flops": 6 * point["params"] * point["tokens"]} if flops == "6ND" else {})


@functools.cache
def kind_keys() -> list[str]:
    """The keys of train.py that say what is trained and how, but not how large or how long."""
    group, found = "", []
    for key in read_keys(ROOT / "train.py"):
        if key.startswith("# "):
            group = key.removeprefix("# ")
        elif group in ("Data", "Model", "Optimization") and key not in SIZE_KEYS:
            found.append(key)
    return found


def select_kind(points: list[dict]) -> list[dict]:
    """The points that differ only in sizes and lengths: of several kinds the most frequent one, which is printed."""
    kinds = collections.Counter(point.get("kind", "") for point in points)
    kind, count = kinds.most_common(1)[0]
    if len(kinds) > 1:
        common = set.intersection(*(set(other.split(", ")) for other in kinds))
        distinctive = ", ".join(pair for pair in kind.split(", ") if pair not in common)
        print(f"{len(kinds)} kinds of runs: the fits use the {count} with {distinctive}")
        keys = sorted({pair.partition("=")[0] for other in kinds for pair in set(other.split(", ")) - common})
        print(f"  (a key that was tuned for each size is a nuisance: --nuisance={keys})".replace("'", '"'))
    return [point for point in points if point.get("kind", "") == kind]


def best_of_nuisance(points: list[dict]) -> list[dict]:
    """Of the runs of one size and length, those with the values of the nuisance keys that have the lowest mean loss."""
    if not any(point.get("nuisance") for point in points):
        return points
    sizes: dict[tuple, dict[str, list[dict]]] = {}
    for point in points:
        # Runs of a batch size of their own differ in tokens by less than a step.
        size = (*(point[key] for key in ("n_embd", "n_layer", "block_size", "data_fraction")), f"{point['tokens']:.2g}")
        setting = ", ".join(f"{key}={value}" for key, value in point["nuisance"].items())
        sizes.setdefault(size, {}).setdefault(setting, []).append(point)
    kept = []
    for size, settings in sizes.items():
        best = min(settings, key=lambda s: statistics.fmean(p["loss"] for p in settings[s]))
        kept += settings[best]
        if len(settings) == 1:
            continue
        name = f"width {size[0]}, depth {size[1]}, context {size[2]}, {size[4]} tokens"
        edge = [key for key, value in settings[best][0]["nuisance"].items() if is_edge(settings, key, value)]
        advice = f"; the best {' and '.join(edge)} is at the edge of its values: add more" if edge else ""
        print(f"{name}: {best}, the best of {len(settings)}{advice}")
    return kept


def is_edge(settings: dict[str, list[dict]], key: str, value) -> bool:
    """Whether a value of a nuisance key is the smallest or largest of several numbers that were tried."""
    tried = {runs[0]["nuisance"][key] for runs in settings.values()}
    numbers = len(tried) > 1 and all(isinstance(v, int | float) for v in tried)
    return numbers and value in (min(tried), max(tried))


# -----------------------------------------------------------------------------
# Tables


def is_table(source: str) -> bool:
    """Whether a source is a table of numbers and not a study, whose results.jsonl has the folders of its runs."""
    path = Path(source)
    if path.suffix in (".csv", ".tsv", ".json"):
        return True
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with open(path, encoding="utf-8", errors="replace") as f:
        return '"path"' not in f.readline()


def read_table(path: Path, columns: str, flops: str) -> list[dict]:
    """Points of a table. columns: our name:theirs, separated by commas. Prints which columns were taken."""
    rows = table_rows(path)
    theirs = list(dict.fromkeys(key for row in rows for key in row))
    chosen = choose_columns(path, theirs, columns)
    points, without = [], 0
    for number, row in enumerate(rows, 2 if path.suffix in (".csv", ".tsv") else 1):
        cells = {ours: row.get(name) for ours, name in chosen.items()}
        cells = {ours: cell for ours, cell in cells.items() if cell not in (None, "")}
        try:
            point = {ours: float(cell) for ours, cell in cells.items()}
        except (TypeError, ValueError):
            wrong = next((f"{chosen[ours]} is {cell!r}" for ours, cell in cells.items() if not is_number(cell)), "")
            raise UserError(f"{path}, line {number}: {wrong}, not a number") from None
        if "loss" not in point or len(point.keys() & {"params", "tokens", "flops"}) < 2:
            without += 1
            continue
        sizes = [value for ours, value in point.items() if ours != "loss"]
        if not all(math.isfinite(size) and size > 0 for size in sizes) or point["loss"] <= 0:
            raise UserError(f"{path}, line {number}: params, tokens, flops and loss must be above 0, and finite")
        points.append(complete(point, flops))
    largest = max((point["params"] for point in points), default=math.inf)
    if largest < 1000:
        print(f"{path}: note: at most {largest:g} parameters; are they in millions? Give parameters and tokens in ones")
    if without:
        print(f"{path}: left out: {without} rows without loss, or without two of params, tokens and flops")
    derived = [f"{key} by 6 params tokens" for key in ("params", "tokens") if key not in chosen]
    if flops == "6ND" or "flops" not in chosen:
        derived.append("flops = 6 params tokens")
        chosen.pop("flops", None)
    taken = [f"{ours} = {name}" for ours, name in chosen.items()]
    print(f"{path}: {len(points)} points, {', '.join(taken + derived)}")
    return points


def table_rows(path: Path) -> list[dict]:
    """The rows of a table, by column. Raises UserError if it is none."""
    if not path.is_file():
        raise UserError(f"--results={path}: there is no such file")
    text = path.read_text(encoding="utf-8-sig", errors="replace")  # Excel writes a byte order mark
    if path.suffix in (".csv", ".tsv"):
        header = text.partition("\n")[0]
        delimiter = max(",;\t", key=header.count)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
        return [{(column or "").strip(): cell for column, cell in row.items()} for row in rows]
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        found = [parse_json(line) for line in lines] if path.suffix == ".jsonl" else parse_json(text)
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}") from None
    if isinstance(found, dict) and found and all(isinstance(column, list) for column in found.values()):
        found = [dict(zip(found, cells)) for cells in zip(*found.values())]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{path}: a table in JSON is a list of objects, or an object of lists")
    return [flatten(row) for row in found]


def flatten(row: dict, prefix: str = "") -> dict:
    """{"config": {"n_embd": 64}} -> {"config.n_embd": 64}"""
    flat: dict = {}
    for key, value in row.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def choose_columns(path: Path, theirs: list[str], columns: str) -> dict[str, str]:
    """Our name -> the table's, by --columns and then by COLUMN_NAMES. Raises UserError, naming the columns, if some lack."""
    chosen: dict[str, str] = {}
    for pair in filter(None, columns.split(",")):
        ours, _, name = pair.partition(":")
        if ours not in (*COLUMN_NAMES, *AXES) or name not in theirs:
            known = f"{', '.join(COLUMN_NAMES)} and, after a colon, one of: {', '.join(theirs)}"
            raise UserError(f"--columns={columns}: {pair} is not one of {known}")
        chosen[ours] = name
    by_lower = {name.lower(): name for name in reversed(theirs)}
    for ours, names in (COLUMN_NAMES | {axis: axis for axis in AXES[:4]}).items():
        found = [by_lower[name] for name in names.split(",") if name in by_lower]
        if ours not in chosen and found:
            chosen[ours] = found[0]
    if theirs and ("loss" not in chosen or len(chosen.keys() & {"params", "tokens", "flops"}) < 2):
        known = ", ".join(f"{ours} = {name}" for ours, name in chosen.items()) or "none of them"
        advice = f"name the others with --columns=loss:...,params:...,tokens:...; its columns are {json.dumps(theirs)}"
        raise UserError(f"{path}: a point needs loss and two of params, tokens, flops. Recognised: {known}; {advice}")
    return chosen


def complete(point: dict, flops: str) -> dict:
    """The point with its third number by flops = 6 params tokens."""
    if "tokens" not in point:
        point["tokens"] = point["flops"] / (6 * point["params"])
    if "params" not in point:
        point["params"] = point["flops"] / (6 * point["tokens"])
    if "flops" not in point or flops == "6ND":
        point["flops"] = 6 * point["params"] * point["tokens"]
    return point


def is_number(cell) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True

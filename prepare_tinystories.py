"""TinyStories, or synthetic stories that need no download, as token shards.

    python prepare_tinystories.py                       TinyStories in GPT-2's tokens: downloads 2 GB, writes 1 GB
    python prepare_tinystories.py --version=v2 --tokenizer=bpe --vocab_size=4096 --data_fraction=0.1
    python prepare_tinystories.py --synthetic=True      stories that a grammar generates in a second

TinyStories (https://arxiv.org/abs/2305.07759) are two million short stories for children, written by GPT-3.5 and GPT-4;
version v2 by GPT-4 only. The downloaded files stay in data_dir/downloads. The same command resumes an interrupted run.

The grammar of the synthetic stories combines people, animals, things and places with a dozen small plots. Each story
binds names, pronouns, things, colors and places anew, so a model has to learn who did what.
"""

import functools
import random
import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.corpus import DatasetWriter, is_up_to_date, make_source, split_text
from common.files import download
from common.tokenizer import Tokenizer, learn_tokenizer, word_tokenizer
from configurator import UserError, check_bounds, check_choice, configure, short_errors

from filelock import FileLock

synthetic = False  # write the synthetic stories instead of TinyStories
version = "v1"  # v1: the original stories | v2: those by GPT-4
HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
source = HUB  # URL or folder of the TinyStories files
dataset = ""  # folder under data_dir (default: tinystories, tinystories_v2 or tinystories_synthetic)
data_dir = "data"  # folder of all datasets
tokenizer = "gpt2"  # gpt2 | char | bpe (trained on the stories)
vocab_size = 4096  # vocabulary size of a bpe tokenizer
max_docs = 0  # largest number of training stories; a tenth as many for validation (0: all, or 12,000 synthetic ones)
data_fraction = 1.0  # use this fraction of the training stories, from the start of the file
shard_tokens = 100_000_000  # tokens per shard file
seed = 1337  # random seed of the synthetic stories
overwrite = False  # replace an existing dataset

FILES = {
    "v1": {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"},
    "v2": {"train": "TinyStoriesV2-GPT4-train.txt", "val": "TinyStoriesV2-GPT4-valid.txt"},
}

GIRLS = "Lily Mia Anna Sara Lucy Emma Rose Ella Nora Zoe Amy Jane".split()
BOYS = "Tom Ben Max Sam Leo Jack Tim Finn Noah Paul Dan Oscar".split()
COLORS = "red blue green yellow orange purple pink white brown silver".split()
TRAITS = "kind brave curious clever cheerful gentle quiet funny friendly careful".split()
TOYS = "ball kite boat drum doll truck robot train puzzle hat scarf balloon lantern whistle bucket".split()
FOODS = "apple sandwich cookie cake pear banana muffin pie peach pancake".split()
ANIMALS = "cat dog rabbit duck bird squirrel frog turtle pony mouse hedgehog fox".split()
PLACES = {  # place -> where something can hide there
    "the park": ["under the bench", "behind the big tree", "near the pond", "next to the swings"],
    "the garden": ["under the bush", "behind the fence", "between the flowers", "next to the gate"],
    "the beach": ["under a towel", "behind a rock", "in the sand", "near the water"],
    "the forest": ["under a log", "behind an oak", "between the roots", "in the tall grass"],
    "the farm": ["under the cart", "behind the barn", "in the hay", "next to the well"],
    "the playground": ["under the slide", "behind the wall", "near the seesaw", "in the sandbox"],
}
ADULTS = {"girl": ["mom", "grandma", "aunt"], "boy": ["dad", "grandpa", "uncle"]}
PRONOUNS = {"girl": {"he": "she", "him": "her", "his": "her"}, "boy": {"he": "he", "him": "him", "his": "his"}}


def draw_words(rng: random.Random) -> dict[str, str]:
    """The words of one story: hero, friend and adult with their pronouns (he, fhe, ahe, He, ...), things and places."""
    hero_kind, friend_kind, adult_kind = (rng.choice(("girl", "boy")) for _ in range(3))
    names = {"girl": rng.sample(GIRLS, 2), "boy": rng.sample(BOYS, 2)}
    words = {"kind": hero_kind, "fkind": friend_kind, "adult": rng.choice(ADULTS[adult_kind])}
    words["hero"], words["friend"] = names[hero_kind][0], names[friend_kind][1]
    for prefix, kind in (("", hero_kind), ("f", friend_kind), ("a", adult_kind)):
        words |= {prefix + key: value for key, value in PRONOUNS[kind].items()}
    words["trait"], words["ftrait"] = rng.sample(TRAITS, 2)
    words["toy"], words["toy2"] = rng.sample(TOYS, 2)
    words["color"], words["color2"] = rng.sample(COLORS, 2)
    words["food"], words["animal"], words["place"] = rng.choice(FOODS), rng.choice(ANIMALS), rng.choice(list(PLACES))
    words["inplace"] = ("in " if words["place"] in ("the park", "the garden", "the forest") else "at ") + words["place"]
    words["spot"], words["spot2"], words["spot3"] = rng.sample(PLACES[words["place"]], 3)
    words["adj"] = rng.choice(["little", "small", "young"])
    for key in ("food", "color", "color2"):
        words["a" + key] = ("an " if words[key][0] in "aeiou" else "a ") + words[key]
    return words | {key.capitalize(): word.capitalize() for key, word in words.items()}


MORNINGS = ["One day,", "One sunny morning,", "One afternoon,", "One windy day,", "One warm day,", "One Sunday,"]
ROOMS = ["under the bed", "behind the door", "in the closet", "behind the curtain", "under the table"]


@functools.cache
def read_grammar() -> dict[str, list[list[str]]]:
    """The sections of common/stories.txt: name -> passages, each a list of variants."""
    text = (Path(__file__).parent / "common" / "stories.txt").read_text(encoding="utf-8")
    sections = (section.split("\n", 1) for section in text.split("\n# ")[1:])
    return {name: [passage.splitlines() for passage in body.strip().split("\n\n")] for name, body in sections}


def story(rng: random.Random) -> str:
    """One story of about 130 words."""
    words, grammar = draw_words(rng), read_grammar()
    words |= {"morning": rng.choice(MORNINGS), "where": rng.choice(ROOMS)}
    name = rng.choice(list(grammar)[3:])  # the plots follow the openings, meetings and endings
    (openings,), (meetings,), (endings,) = (grammar[title] for title in ("openings", "meetings", "endings"))
    opening, has_friend = rng.choice(openings), name.endswith("(friend)")
    if has_friend:
        opening += " " + rng.choice(meetings)
    passages = [rng.choice(variants) for variants in grammar[name]]
    has_friend = has_friend or any("{friend}" in passage for passage in passages)
    ending = rng.choice([e for e in endings if has_friend or "{friend}" not in e])
    half = len(passages) // 2
    paragraphs = [opening, " ".join(passages[:half]), " ".join(passages[half:]) + " " + ending]
    return "\n".join(paragraph.format(**words) for paragraph in paragraphs)


def make_synthetic(folder: Path, count=12_000, val_fraction=0.05, vocab_size=2048, seed=1337, overwrite=False) -> None:
    """Write `count` synthetic stories as a dataset. Raises UserError if the folder already holds another one."""
    if count < 2:
        raise UserError(f"--max_docs={count}: must be at least 2, one story for each split")
    arguments = {"synthetic": True, "max_docs": count, "val_fraction": val_fraction, "seed": seed}
    if is_up_to_date(folder, arguments, overwrite):
        return
    rng = random.Random(seed)
    texts = list(dict.fromkeys(story(rng) for _ in range(count)))  # without duplicates, so the splits are disjoint
    n_val = max(1, round(len(texts) * val_fraction))
    writer = DatasetWriter(folder, arguments, lambda: word_tokenizer("\n\n".join(texts), vocab_size), overwrite)
    for split, part in (("val", texts[:n_val]), ("train", texts[n_val:])):
        writer.write(make_source(lambda part=part: part), split)
    writer.finish("the story grammar of prepare_tinystories.py")
    print(f"{writer.summary}, {len(texts):,} stories")


def make_missing_stories(keys: dict) -> None:
    """Make the synthetic stories if --dataset names them and they are not there. Several processes may call it at once."""
    folder = Path(keys["data_dir"]) / "tinystories_synthetic"
    if folder.name not in re.split("[:,]", keys["dataset"]) or (folder / "meta.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / "meta.json").exists():  # another process may have made it while this one waited
            print(f"{folder} does not exist: writing its stories (prepare_tinystories.py --synthetic=True)")
            make_synthetic(folder)


def make_tinystories(folder: Path) -> None:
    """Download TinyStories, tokenize the stories in their order, and write the dataset."""
    arguments = {k: globals()[k] for k in ("version", "tokenizer", "vocab_size", "max_docs", "data_fraction")}
    arguments |= {"source": source} if source != HUB else {}
    if is_up_to_date(folder, arguments, overwrite):
        return
    paths = {split: find_file(name) for split, name in FILES[version].items()}
    sources = {
        "val": partial(read_stories, paths["val"], -(-max_docs // 10), 1.0),
        "train": partial(read_stories, paths["train"], max_docs, data_fraction),
    }
    if next(sources["train"](None), None) is None:
        raise UserError(f"{paths['train']} holds no story")

    def texts(*splits: str) -> Iterator[str]:
        return (text for split in splits for text, _ in sources[split](None))

    def make_tokenizer() -> Tokenizer:
        return learn_tokenizer(tokenizer, vocab_size, lambda: texts("train", "val"), lambda: texts("train"))

    writer = DatasetWriter(folder, arguments, make_tokenizer, overwrite, shard_tokens=shard_tokens)
    for split, read in sources.items():
        writer.write(read, split)
    writer.finish(f"TinyStories {version}")
    print(writer.summary)
    place = f" --data_dir={shlex.quote(data_dir)}" if data_dir != "data" else ""
    print(f"Train on it: python train.py config/baby_cpu.py --dataset={folder.name}{place}")


def find_file(name: str) -> Path:
    """A TinyStories file in the source folder, or downloaded once."""
    is_folder = Path(source).is_dir()
    path = (Path(source) if is_folder else Path(data_dir) / "downloads") / name
    if is_folder and not path.exists():
        raise UserError(f"--source={source}: there is no {name} in this folder")
    download(f"{source}/{name}", path)
    return path


def read_stories(path: Path, limit: int, fraction: float, position) -> Iterator[tuple[str, list[int]]]:
    """At most `limit` stories (0: all) of the first part of a file, each with [byte, number of stories] after it."""
    byte, count = position or (0, 0)
    end = path.stat().st_size * fraction
    for text, after in split_text(path, byte):
        if (limit and count >= limit) or byte >= end:
            return
        byte, count = after, count + 1
        yield text, [byte, count]


def main() -> None:
    check_choice("version", version, FILES)
    check_bounds(globals(), at_least_0="max_docs", at_least_1="shard_tokens")
    if not 0 < data_fraction <= 1:
        raise UserError(f"--data_fraction={data_fraction}: must be above 0 and at most 1")
    if not synthetic:
        return make_tinystories(Path(data_dir) / (dataset or {"v1": "tinystories", "v2": "tinystories_v2"}[version]))
    if (version, tokenizer, vocab_size, data_fraction) != ("v1", "gpt2", 4096, 1.0):
        reason = "the synthetic stories have their own vocabulary"
        raise UserError(
            f"--synthetic=True: {reason}; leave out --version, --tokenizer, --vocab_size and --data_fraction"
        )
    folder = Path(data_dir) / (dataset or "tinystories_synthetic")
    make_synthetic(folder, max_docs or 12_000, seed=seed, overwrite=overwrite)


if __name__ == "__main__":
    with short_errors():
        configure(globals())
        main()

"""TinyStories, or synthetic stories that need no download, as token shards.

    python prepare_tinystories.py                       TinyStories in GPT-2's tokens: downloads 2 GB, writes 1 GB
    python prepare_tinystories.py --version=v2 --tokenizer=bpe --vocab_size=4096 --data_fraction=0.1
    python prepare_tinystories.py --synthetic=True      stories that a grammar generates in a second

TinyStories (https://arxiv.org/abs/2305.07759) are two million short stories for children, written by GPT-3.5 and GPT-4;
version v2 by GPT-4 only. The downloaded files stay in data_dir/downloads. The same command resumes an interrupted run.

The grammar of the synthetic stories combines people, animals, things and places with a dozen small plots. Each story
binds names, pronouns, things, colors and places anew, so a model has to learn who did what.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from filelock import FileLock

from common.corpus import DatasetWriter, is_up_to_date, make_source, split_text
from common.files import download
from common.tokenizer import Tokenizer, learn_tokenizer, word_tokenizer
from configurator import UserError, check_bounds, check_choice, configure, short_errors

synthetic = False  # write the synthetic stories instead of TinyStories
version = "v1"  # v1: the original stories | v2: those by GPT-4
source = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"  # URL or folder of the TinyStories files
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


def cast(rng: random.Random) -> dict[str, str]:
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


OPENINGS = [
    "Once upon a time, there was a {adj} {kind} named {hero}. {He} was very {trait}.",
    "Once upon a time, there was a {trait} {kind} named {hero}. {He} lived in {acolor2} house near {place}.",
    "Once upon a time, a {adj} {kind} named {hero} lived with {his} {adult}. {He} was always {trait}.",
    "There once was a {adj} {kind} whose name was {hero}. Everyone said that {he} was {trait}.",
    "{hero} was a {trait} {kind} who lived near {place}.",
]
MEETINGS = [
    "{His} best friend was a {ftrait} {fkind} named {friend}.",
    "{He} had a friend named {friend}, who was very {ftrait}.",
    "{hero} liked to play with {his} friend {friend}.",
]
MORNINGS = ["One day,", "One sunny morning,", "One afternoon,", "One windy day,", "One warm day,", "One Sunday,"]
ENDINGS = [
    "That night, {hero} told {his} {adult} all about it and fell asleep with a smile.",
    "From that day on, {hero} and {friend} were the best of friends.",
    "{hero} and {friend} laughed and played until the sun went down.",
    "It was the best day ever.",
    "{hero} went home with a happy heart.",
    "They all lived happily ever after.",
]

# A plot is a list of passages; a passage is a list of variants, of which a story takes one.
PLOTS = {
    "lost": [
        ["{morning} {hero} took {his} {color} {toy} to {place}."],
        ["{He} played with the {toy} all morning, but then {he} could not find it.", "{He} put the {toy} down to chase a {animal}. When {he} came back, the {toy} was gone."],
        ['"Oh no! Where is my {toy}?" cried {hero}. {He} was very sad.', '"My {color} {toy} is lost!" said {hero}, and {he} began to cry.'],
        ['{friend} heard {him} and came to help. "Do not cry," said {friend}. "I will help you look for it."',
         '{friend} saw that {hero} was sad. "What is wrong?" asked {friend}. "I lost my {toy}," said {hero}. "Let us look together," said {friend}.'],
        ["First, they looked {spot}, but it was not there. Then they looked {spot2}, but it was not there."],
        ["At last, {friend} looked {spot3}. There was the {color} {toy}!", "Then {friend} saw something {color} {spot3}. It was the {toy}!"],
        ['"Thank you, {friend}!" said {hero}, and {he} gave {fhim} a big hug.', '{hero} was so happy. "You are a good friend, {friend}," {he} said.'],
    ],
    "share": [
        ["{morning} {hero} went to {place} with {afood} in {his} bag.", "{morning} {his} {adult} gave {hero} {afood}, and {he} went to {place}."],
        ["There {he} saw {friend}, who sat {spot} and looked sad.", "{friend} was sitting {spot}, all alone."],
        ['"Why are you sad?" asked {hero}. "I am hungry, and I have nothing to eat," said {friend}.',
         '"What is the matter?" asked {hero}. "I forgot my lunch," said {friend}, "and I am so hungry."'],
        ["{hero} looked at the {food}. It was big enough for two.", "{hero} wanted to eat the whole {food}, but {he} felt sorry for {friend}."],
        ['So {he} cut the {food} in half. "Here, one half is for you," {he} said.', '"We can share my {food}," said {hero}, and {he} gave {friend} half of it.'],
        ["{friend} ate it and smiled. The next day, {fhe} brought {acolor2} {toy} and shared it with {hero}.",
         '{friend} was not sad anymore. "Now I will share my {color2} {toy} with you," {fhe} said, and they played together.'],
        ["{hero} learned that sharing makes friends.", "{hero} was glad that {he} had shared the {food}."],
    ],
    "broken": [
        ["{morning} {hero} showed {friend} {his} new {color} {toy}."],
        ['"May I play with it?" asked {friend}. "Yes, but please be careful," said {hero}.'],
        ["But {friend} ran too fast and dropped the {toy}. Crack! It broke.", "{friend} threw the {toy} high up. It fell on a stone and broke."],
        ['{hero} was angry. "You broke my {toy}!" {he} said. {friend} began to cry.', "{hero} started to cry, because {he} loved that {toy}."],
        ['"I am so sorry," said {friend}. "I did not want to break it. Let us fix it."'],
        ["They asked {his} {adult} for help. {hero} held the {toy}, and {friend} put glue on it.", "{friend} got some tape, and {hero} held the pieces. {His} {adult} helped them."],
        ["Soon the {color} {toy} was as good as new.", "In the end, the {toy} worked again."],
        ['"I am not angry anymore," said {hero}. {friend} smiled, and they played together.', "{hero} forgave {friend}, because {fhe} had said sorry."],
    ],
    "stuck": [
        ["{morning} {hero} walked to {place} with {his} {adult}."],
        ["There {he} heard a tiny sound. A little {color} {animal} was stuck {spot}!", "Suddenly {he} saw a little {animal} {spot}. It was stuck and could not move."],
        ['"Help me, please!" said the {animal}. "I have been here all night."', '"Please help me," cried the {animal}. "I want to go home to my family."'],
        ["{hero} pulled and pulled, but {he} was not strong enough.", "{hero} tried to help, but {he} was too small."],
        ["So {he} called {his} {adult}. Together they pulled, and the {animal} was free.", "Then {his} {adult} came and lifted the heavy branch, and the {animal} jumped out."],
        ['"Thank you," said the {animal}. "You are very {trait}." Then it ran home to its family.', 'The {animal} was so happy that it danced. "Thank you, {hero}!" it said.'],
        ["The next day, the {animal} came back and gave {hero} {acolor} flower.", "{hero} was proud, because {he} had helped someone small."],
    ],
    "rain": [
        ["{morning} {hero} wanted to fly {his} {color} kite with {friend}.", "{morning} {hero} and {friend} wanted to go to {place}."],
        ["But then dark clouds came, and it began to rain.", "But it was raining, and the wind was cold."],
        ['"Now we cannot go outside," said {hero}. {He} was sad.', '"I do not like the rain," said {friend}, and {fhe} looked out of the window.'],
        ['{His} {adult} had an idea. "You can build a house out of blankets," {ahe} said.', '"Do not be sad," said {his} {adult}. "We can bake {afood} together."'],
        ["So they stayed inside and laughed and sang songs.", "They worked hard and made a big mess, and {friend} laughed."],
        ["When they were done, the rain stopped, and {acolor} bird sang outside.", "Then the sun came out, and there was a big rainbow over {place}."],
        ['"The rain was not so bad," said {hero}. {friend} nodded.', '"I like rainy days now," said {hero}.'],
    ],
    "dark": [
        ["{hero} had one secret. {He} was afraid of the dark.", "But there was one thing {hero} did not like. {He} was scared of the dark."],
        ["One night, {he} heard a noise {where}.", "One night, there was a strange sound {where}."],
        ['"{Adult}, there is a monster!" {he} called.', '"Help! A monster!" cried {hero}, and {he} hid under the blanket.'],
        ["{His} {adult} came with a lamp. \"Let us look together,\" {ahe} said."],
        ["{hero} took a deep breath and looked {where}. It was only a small {animal}!", "They looked {where}. There was no monster, only a little {animal} that wanted to play."],
        ['{hero} laughed. "You are not a monster," {he} said, and {he} gave the {animal} some milk.', '"Hello, little {animal}," said {hero}. {He} was not afraid anymore.'],
        ["After that, {hero} was never scared of the dark again.", "{His} {adult} said, \"You were very brave today.\""],
    ],
    "gift": [
        ["It was the birthday of {his} friend {friend}, and {hero} did not have a gift.", "{morning} {hero} remembered that it was {friend}'s birthday, but {he} had no gift."],
        ['"What can I give to {friend}?" {he} asked {his} {adult}. "{Fhe} likes {color} things," said {his} {adult}.',
         '{He} asked {his} {adult} for help. "You can make something {color}," {ahe} said.'],
        ["So {hero} took {color} paper and some string and made a {toy}.", "{hero} found some {color} paint and painted an old {toy}. Now it was as good as new."],
        ["{He} put it in a box and went to {friend}'s house.", "Then {he} put the {toy} in a box and ran to the party."],
        ['"Happy birthday, {friend}!" said {hero}. {friend} opened the box and smiled.'],
        ['"{Acolor} {toy}! This is the best gift of all," said {friend}, "because you made it for me."', '"I love it!" said {friend}. "I will keep this {color} {toy} forever."'],
    ],
    "truth": [
        ["{morning} {hero} was playing with {his} {color} {toy} inside the house.", "{morning} {hero} ran around the kitchen with {his} {toy}."],
        ["The {toy} hit {acolor2} cup, and the cup fell on the floor and broke.", "{He} bumped into the table, and {acolor2} cup fell down and broke."],
        ["{hero} was scared. {He} hid the pieces {where}.", "{hero} did not know what to do, so {he} hid {where}."],
        ['Soon {his} {adult} came in. "Who broke my {color2} cup?" {ahe} asked.'],
        ['{hero} wanted to say that the {animal} did it. But that was not true.', "{hero} could say that {friend} did it. But {he} knew that it was wrong to lie."],
        ['"I did it," {he} said. "I am very sorry."', '"It was me," said {hero} in a small voice. "I am sorry."'],
        ['{His} {adult} hugged {him}. "Thank you for telling the truth," {ahe} said. "A cup is only a cup."',
         '"I am glad that you told me the truth," said {his} {adult}, and {ahe} was not angry.'],
        ["Together they cleaned the floor, and {hero} felt much better.", "{hero} learned that it is good to tell the truth."],
    ],
    "seed": [
        ["{morning} {his} {adult} gave {hero} a tiny seed.", "{morning} {hero} found a tiny seed {spot}."],
        ['"What will it be?" asked {hero}. "You must wait and see," said {his} {adult}.'],
        ["{hero} put the seed in the ground and gave it water every day.", "{He} planted the seed in {acolor2} pot and watered it every morning."],
        ['But nothing happened. "It is not growing," said {hero}. {He} wanted to give up.', "{He} waited and waited, but the pot was still empty. {hero} was sad."],
        ['"Be patient," said {friend}. "Good things take time."', '{friend} came to visit. "Do not give up," {fhe} said. "Keep giving it water."'],
        ["One day, a small green leaf came out of the ground.", "Then, after many days, there was a little green leaf."],
        ["It grew and grew, and soon there was a big {color} flower.", "The plant grew taller and taller, and at last it had {acolor} flower."],
        ['"Look what I grew!" said {hero}. {His} {adult} was very proud of {him}.', "{hero} gave the {color} flower to {friend}, and {friend} smiled."],
    ],
    "race": [
        ["{morning} there was a big race {inplace}.", "{morning} all the children came to {place} for a race."],
        ['"I will win and get the {color} {toy}!" said {friend}. {hero} wanted to win, too.', "The prize was {acolor} {toy}. {hero} and {friend} both wanted to win it."],
        ["They ran as fast as they could. {hero} was first, and {friend} was behind {him}."],
        ["Suddenly {friend} fell and hurt {fhis} knee.", "Then {friend} tripped over a stone and fell down."],
        ["{hero} heard {fhim} cry and stopped. {He} went back to help {friend}.", '"Are you hurt?" asked {hero}, and {he} ran back to {friend}.'],
        ["{He} helped {fhim} up, and they walked to the end together, hand in hand."],
        ["They did not win, but everyone clapped for them.", "They were last, but nobody laughed."],
        ['"You are a true friend," said {friend}. {hero} was happier than if {he} had won the {toy}.', 'The teacher gave the {color} {toy} to {hero}. "You were the kindest of all," she said.'],
    ],
    "greedy": [
        ["{morning} {his} {adult} made {afood} for the whole family.", "{morning} there was {afood} on the kitchen table. It smelled so good."],
        ['"Please wait until dinner," said {his} {adult}. "It is for all of us."', '"Do not eat it now," said {his} {adult}. "{friend} is coming for dinner."'],
        ["But {hero} was hungry, and {he} ate one bite, and then one more.", "{hero} wanted only one small bite. But it was so good that {he} could not stop."],
        ["Soon the whole {food} was gone, and {his} tummy hurt.", "{He} ate the whole {food}, and then {he} felt sick."],
        ['"Oh, my tummy!" cried {hero}. "I ate too much."', '{hero} lay down on the bed. "I should have waited," {he} said.'],
        ['{His} {adult} gave {him} some tea. "Now you know why we wait," {ahe} said.'],
        ["The next day, {hero} helped to make a new {food}, and this time {he} shared it with {friend}."],
    ],
    "tree": [
        ["{morning} {hero} and {friend} flew {acolor} kite {inplace}.", "{morning} {hero} played with {acolor} balloon {inplace}, and {friend} was there, too."],
        ["A strong wind came and took it up into a tall tree.", "The wind blew it high up into a tree."],
        ['"It is too high," said {friend}. "We cannot reach it."', "{hero} jumped and jumped, but {he} could not reach it."],
        ['"I will climb the tree," said {hero}. "No, that is not safe," said {friend}. "Let us ask for help."'],
        ["So they ran to find {his} {adult}, who had a long ladder.", "{friend} saw {his} {adult} and called out. {His} {adult} was very tall."],
        ["{His} {adult} went up and brought it down.", "{His} {adult} reached up and pulled it out of the tree."],
        ['"Thank you!" said {hero} and {friend}. "Next time, hold on tight," said {his} {adult}.', '"It is good that you asked for help," said {his} {adult}. {hero} smiled at {friend}.'],
    ],
}  # fmt: skip
ROOMS = ["under the bed", "behind the door", "in the closet", "behind the curtain", "under the table"]
USES_FRIEND_FIRST = ("lost", "broken", "rain", "seed", "race", "greedy", "tree", "truth")


def story(rng: random.Random) -> str:
    """One story of about 130 words."""
    words = cast(rng)
    words |= {"morning": rng.choice(MORNINGS), "where": rng.choice(ROOMS)}
    name = rng.choice(list(PLOTS))
    opening = rng.choice(OPENINGS)
    if name in USES_FRIEND_FIRST:
        opening += " " + rng.choice(MEETINGS)
    passages = [rng.choice(variants) for variants in PLOTS[name]]
    has_friend = any("{friend}" in passage for passage in passages) or name in USES_FRIEND_FIRST
    ending = rng.choice([e for e in ENDINGS if has_friend or "{friend}" not in e])
    half = len(passages) // 2
    paragraphs = [opening, " ".join(passages[:half]), " ".join(passages[half:]) + " " + ending]
    return "\n".join(paragraph.format(**words) for paragraph in paragraphs)


def make_synthetic(folder: Path, count=12_000, val_fraction=0.05, vocab_size=2048, seed=1337, overwrite=False) -> None:
    """Write `count` synthetic stories as a dataset. Raises UserError if the folder already holds one."""
    if count < 2:
        raise UserError(f"--max_docs={count}: must be at least 2, one story for each split")
    rng = random.Random(seed)
    texts = list(dict.fromkeys(story(rng) for _ in range(count)))  # without duplicates, so the splits are disjoint
    n_val = max(1, round(len(texts) * val_fraction))
    arguments = {"synthetic": True, "max_docs": count, "val_fraction": val_fraction, "seed": seed}
    writer = DatasetWriter(folder, arguments, lambda: word_tokenizer("\n\n".join(texts), vocab_size), overwrite)
    for split, part in (("val", texts[:n_val]), ("train", texts[n_val:])):
        writer.write(make_source(lambda part=part: part), split)
    writer.finish("the story grammar of prepare_tinystories.py")
    print(f"{writer.summary}, {len(texts):,} stories")


def ensure_synthetic(folder: Path) -> None:
    """Make the dataset of synthetic stories if it is missing. Safe to call from several processes at once."""
    if (folder / "meta.json").exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / "meta.json").exists():  # another process may have made it while this one waited
            print(f"{folder} does not exist: writing its stories (prepare_tinystories.py --synthetic=True)")
            make_synthetic(folder)


def make_tinystories(folder: Path) -> None:
    """Download TinyStories, tokenize the stories in their order, and write the dataset."""
    arguments = {k: globals()[k] for k in ("version", "tokenizer", "vocab_size", "max_docs", "data_fraction")}
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
    print(f"Train on it: python train.py config/baby_cpu.py --dataset={folder.name}")


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

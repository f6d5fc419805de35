"""Language: texts about a scene (captions, questions, answers, stories), with their exact readers.

    scene --caption--> text --read_caption--> Description, or None if the text is not a caption
    scene --question--> question, answer          scene --story--> sentences; any prefix is a prompt

`matches` compares a picture that was read with a caption, `answers` gives every true answer to a
question, and `consistent` says whether a text continues a story without a contradiction. These
judges accept the grammar of this file alone. Objects are named in reading order, because the
picture then shows which object is meant; with a random order a model mixes up attributes.

Run: python -m scenes.language   (CPU, 1 s)
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

from scenes.pictures import (BACKGROUNDS, COLORS, COUNTS, INVERSE, SHAPES, SIZES, Object, Scene,
                             is_relation, main_relation, pick, sample_scene)


@dataclasses.dataclass(frozen=True)
class Description:
    """What a caption states."""
    objects: tuple[tuple[str, str, str], ...]             # (size, color, shape)
    relations: tuple[tuple[int, str, int], ...]           # (i, "left of", j)
    background: str


def one_of(words) -> str:
    """A regular expression that matches any of the words."""
    return "(?:" + "|".join(words) + ")"


def with_article(words) -> str:
    """("large", "red", "circle") -> "a large red circle"."""
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


# ---- Captions ----------------------------------------------------------------------------------

# The same wordings write and read captions. a, b, c are the objects in the order of their names;
# ab is the relation of a to b, and ba_suffix says it afterwards: "a with b to its right".
SUFFIX = {"left of": "to its left", "right of": "to its right",
          "above": "above it", "below": "below it"}
WORDINGS = {
    1: ("{a} on a {bg} background",
        "on a {bg} background, {a}",
        "there is {a}. the background is {bg}."),
    2: ("{a} {ab} {b} on a {bg} background",
        "on a {bg} background, {a} {ab} {b}",
        "{a} is {ab} {b}. the background is {bg}.",
        "{a} with {b} {ba_suffix}, on a {bg} background",
        "{ba} {a} is {b}. the background is {bg}."),
    3: ("{a} {ab} {b}, which is {bc} {c}, on a {bg} background",
        "on a {bg} background, {a} {ab} {b}, which is {bc} {c}",
        "{a} is {ab} {b}, which is {bc} {c}. the background is {bg}.",
        "{a} with {b} {ba_suffix} and {c} {cb} that, on a {bg} background",
        "{ba} {a} is {b}. {cb} that is {c}. the background is {bg}."),
}


def caption(scene: Scene, rng: np.random.Generator, wording: int | None = None) -> str:
    """Describe a scene in full, in the given wording (modulo their number) or in a random one."""
    words = {"bg": scene.background}
    words |= {name: with_article(o.attributes) for name, o in zip("abc", scene.objects)}
    for p, q, first, second in zip("ab", "bc", scene.objects, scene.objects[1:]):
        words[p + q] = main_relation(first, second)
        words[q + p] = main_relation(second, first)
        words[q + p + "_suffix"] = SUFFIX[words[q + p]]
    wordings = WORDINGS[len(scene.objects)]
    chosen = pick(rng, wordings) if wording is None else wordings[wording % len(wordings)]
    return chosen.format(**words)


def read_caption(text: str) -> Description | None:
    """What a caption states, or None if it is not in the grammar. Objects may have any order."""
    found = next(filter(None, (p.fullmatch(text) for p in caption_patterns())), None)
    if found is None:
        return None
    words = found.groupdict()
    if "ba_suffix" in words:
        words["ba"] = next(rel for rel, suffix in SUFFIX.items() if suffix == words["ba_suffix"])
    return Description(
        objects=tuple(tuple(words[name].split()[1:]) for name in "abc" if name in words),
        relations=tuple(("abc".index(p), words[p + q], "abc".index(q))
                        for p, q in ("ab", "ba", "bc", "cb") if p + q in words),
        background=words["bg"])


@functools.cache
def caption_patterns() -> list[re.Pattern]:
    """A regular expression for each wording, its groups named as in WORDINGS."""
    noun = f"a {one_of(SIZES)} {one_of(COLORS)} {one_of(SHAPES)}"
    parts = dict.fromkeys(("a", "b", "c"), noun)
    parts |= dict.fromkeys(("ab", "ba", "bc", "cb"), one_of(INVERSE))
    parts |= {"ba_suffix": one_of(SUFFIX.values()), "bg": one_of(BACKGROUNDS)}
    groups = {name: f"(?P<{name}>{part})" for name, part in parts.items()}
    return [re.compile(wording.replace(".", r"\.").format(**groups))
            for wordings in WORDINGS.values() for wording in wordings]


# ---- Judging -----------------------------------------------------------------------------------

JUDGED = ("count", "color", "shape", "size", "relation", "background", "scene")


def matches(scene: Scene | None, description: Description) -> dict[str, bool]:
    """Compare a picture, as read (None: refused, nothing matches), with a caption.

    count, color, shape and size compare the objects as multisets. relation assigns the described
    objects to the drawn ones so that most attributes agree, and asks for all stated relations.
    scene asks for every attribute of every object, the background and all relations.
    """
    same = dict.fromkeys(JUDGED, False)
    if scene is None:
        return same
    described, drawn = description.objects, [o.attributes for o in scene.objects]
    for k, name in enumerate(("size", "color", "shape")):
        same[name] = sorted(d[k] for d in drawn) == sorted(d[k] for d in described)
    same["count"] = len(drawn) == len(described)
    same["background"] = scene.background == description.background
    if same["count"]:
        orders = list(itertools.permutations(scene.objects))
        agree = [sum(x == y for o, d in zip(order, described) for x, y in zip(o.attributes, d))
                 for order in orders]
        same["relation"] = any(relations_are_true(description, order)
                               for order, number in zip(orders, agree) if number == max(agree))
        every = max(agree) == 3 * len(described)
        same["scene"] = every and same["relation"] and same["background"]
    return same


def relations_are_true(description: Description, objects) -> bool:
    return all(is_relation(objects[i], rel, objects[j]) for i, rel, j in description.relations)


def is_exact(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read (None: it does not parse) describes all of a scene rightly."""
    return description is not None and matches(scene, description)["scene"]


def is_true(description: Description | None, scene: Scene) -> bool:
    """Whether a caption as read states no false fact; it may leave objects out."""
    if description is None or description.background != scene.background:
        return False
    choices = itertools.permutations(scene.objects, len(description.objects))
    return any(tuple(o.attributes for o in objects) == description.objects
               and relations_are_true(description, objects) for objects in choices)


# ---- Questions ---------------------------------------------------------------------------------

PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in (*SHAPES, "object")}
ADJECTIVES = f"(?:{one_of(SIZES)} )?(?:{one_of(COLORS)} )?"
THE = f"the ({ADJECTIVES}{one_of((*SHAPES, 'object'))})"               # one group: the phrase
RELATION = f"({one_of(INVERSE)})"

ASK_BACKGROUND = "what color is the background?"
ASK_COUNT = re.compile(rf"how many ({ADJECTIVES})({one_of(PLURAL.values())}) are there\?")
ASK_ATTRIBUTE = re.compile(rf"what (color|shape) is {THE}\?")
ASK_OBJECT = re.compile(rf"what is {RELATION} {THE}\?")
ASK_RELATION = re.compile(rf"is {THE} {RELATION} {THE}\?")


def fits(o: Object, phrase: str) -> bool:
    """Whether a phrase such as "large circle" or "red object" is true of an object."""
    return all(word in o.attributes for word in phrase.split() if word != "object")


@functools.lru_cache(maxsize=64)
def unique_phrases(scene: Scene, o: Object) -> list[str]:
    """Every phrase that is true of this object and of no other one in the scene."""
    size, color, shape = o.attributes
    choices = itertools.product(("", size + " "), ("", color + " "), (shape, "object"))
    return [p for p in map("".join, choices) if sum(fits(q, p) for q in scene.objects) == 1]


def question(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask about a scene -> (question, answer). Each question has one answer, seen in the picture.

    Colors, shapes, counts and relations are asked for equally often where the scene allows.
    """
    for kind in rng.permutation(["color", "shape", "count", "relation"]):
        if asked := ask(kind, scene, pick(rng, scene.objects), rng):
            (answer,) = answers(scene, asked)
            return asked, answer


def ask(kind: str, scene: Scene, o: Object, rng: np.random.Generator) -> str | None:
    """A question of a kind about an object, or None if it cannot be asked; a count always can."""
    phrases = unique_phrases(scene, o)
    if kind == "count":
        things = pick(rng, ["objects", "objects", f"{o.color} objects", f"{o.size} objects",
                            PLURAL[o.shape]])
        return f"how many {things} are there?"
    if kind == "color" and rng.random() < 0.2:
        return ASK_BACKGROUND
    if kind in ("color", "shape"):
        hiding = [p for p in phrases if getattr(o, kind) not in p.split()]      # the answer
        return f"what {kind} is the {pick(rng, hiding)}?" if hiding else None

    others = [q for q in scene.objects if q is not o and unique_phrases(scene, q)]
    if not others:
        return None
    other = pick(rng, others)
    other_phrases = unique_phrases(scene, other)
    rel = main_relation(o, other)
    is_only = [q for q in scene.objects if is_relation(q, rel, other)] == [o]
    if is_only and rng.random() < 0.5:
        return f"what is {rel} the {pick(rng, other_phrases)}?"
    if phrases:
        subject, rel = pick(rng, phrases), pick(rng, [rel, INVERSE[rel]])
        return f"is the {subject} {rel} the {pick(rng, other_phrases)}?"
    return None


def answers(scene: Scene, asked: str) -> set[str]:
    """Every true answer; no answer if a question does not parse or "the ..." is not one object."""
    def the(phrase):
        found = [o for o in scene.objects if fits(o, phrase)]
        return found[0] if len(found) == 1 else None

    if asked == ASK_BACKGROUND:
        return {scene.background + "."}
    if m := ASK_COUNT.fullmatch(asked):
        noun = m[1] + next(s for s, plural in PLURAL.items() if plural == m[2])
        return {("none", *COUNTS)[sum(fits(o, noun) for o in scene.objects)] + "."}
    if (m := ASK_ATTRIBUTE.fullmatch(asked)) and (o := the(m[2])):
        return {getattr(o, m[1]) + "."}
    if (m := ASK_OBJECT.fullmatch(asked)) and (other := the(m[2])):
        return {with_article(o.attributes) + "." for o in scene.objects
                if is_relation(o, m[1], other)}
    if (m := ASK_RELATION.fullmatch(asked)) and (o := the(m[1])) and (other := the(m[3])):
        return {"yes." if is_relation(o, m[2], other) else "no."}
    return set()


# ---- Stories -----------------------------------------------------------------------------------

THING = f"{ADJECTIVES}{one_of(SHAPES)}"
A_THING = f"(?:a(?! o)|an(?= o)) ({THING})"                   # a red ..., an orange ...

SAY_BACKGROUND = re.compile(f"the background is ({one_of(BACKGROUNDS)})")
SAY_COUNT = re.compile("there (?:is (one) object|are (two|three) objects)")
SAY_EXISTS = re.compile(f"there is {A_THING}")
SAY_NEXT_TO = re.compile(f"{RELATION} the ({THING}) is {A_THING}")
SAY_RELATION = re.compile(f"the ({THING}) is {RELATION} the ({THING})")
SAY_ATTRIBUTE = re.compile(f"the ({THING}) is ({one_of((*SIZES, *COLORS))})")


class Facts:
    """What a sequence of sentences states. An object has only the attributes that were stated."""

    def __init__(self):
        self.scene = {}                       # "background" and "count"
        self.objects = []                     # a dict each, such as {"color": "red"}
        self.order = {"left of": set(), "above": set()}   # pairs (i, j), transitively closed

    def add(self, sentence: str) -> bool:
        """Add a sentence without its period -> whether it states a new fact.

        ValueError if it does not parse or contradicts a fact; then nothing is added.
        """
        if m := SAY_BACKGROUND.fullmatch(sentence):
            return self.learn(self.scene, "background", m[1])
        if m := SAY_COUNT.fullmatch(sentence):
            if len(self.objects) > COUNTS.index(m[1] or m[2]) + 1:
                raise ValueError("more objects were mentioned")
            return self.learn(self.scene, "count", m[1] or m[2])
        if m := SAY_EXISTS.fullmatch(sentence):
            self.introduce(m[1])
            return True
        if m := SAY_NEXT_TO.fullmatch(sentence):
            other = self.find(m[2])           # first, so that it cannot be the new object
            return self.relate(self.introduce(m[3]), m[1], other)
        if m := SAY_RELATION.fullmatch(sentence):
            return self.relate(self.find(m[1]), m[2], self.find(m[3]))
        if m := SAY_ATTRIBUTE.fullmatch(sentence):
            key = "size" if m[2] in SIZES else "color"
            return self.learn(self.objects[self.find(m[1])], key, m[2])
        raise ValueError("not in the grammar")

    def learn(self, known: dict, key: str, value: str) -> bool:
        """Set a value -> whether it is new. ValueError if another one is known."""
        new = key not in known
        if known.setdefault(key, value) != value:
            raise ValueError(f"the {key} is {known[key]}")
        return new

    def find(self, phrase: str) -> int:
        """The index of the only object for which all words of a phrase were stated."""
        words = set(phrase.split())
        found = [i for i, known in enumerate(self.objects) if words <= set(known.values())]
        if len(found) != 1:
            raise ValueError(f"{len(found)} objects are the {phrase}")
        return found[0]

    def introduce(self, phrase: str) -> int:
        """Add an object -> its index. It must differ from all others in a stated attribute."""
        new = {"size" if w in SIZES else "color" if w in COLORS else "shape": w
               for w in phrase.split()}
        if any(all(known.get(key, w) == w for key, w in new.items()) for known in self.objects):
            raise ValueError(f"a {phrase} may have been mentioned before")
        if len(self.objects) == COUNTS.index(self.scene.get("count", COUNTS[-1])) + 1:
            raise ValueError("there are no more objects")
        self.objects.append(new)
        return len(self.objects) - 1

    def relate(self, i: int, rel: str, j: int) -> bool:
        """Add that object i is rel of object j -> whether this does not follow from the others."""
        if rel not in self.order:
            i, rel, j = j, INVERSE[rel], i
        old = self.order[rel]
        if i == j or (j, i) in old:
            raise ValueError(f"an object is {rel} itself")
        pairs = old | {(i, j)}
        self.order[rel] = pairs | {(a, d) for a, b in pairs for c, d in pairs if b == c}
        return (i, j) not in old


def story(scene: Scene, rng: np.random.Generator) -> str:
    """Three to six sentences about a scene. Each states a new fact; a later one may add what an
    earlier one left out, and objects are named by attributes that were stated before."""
    facts, sentences = Facts(), []
    mentioned = {}                            # Object -> its stated attributes, a dict of facts
    length = int(rng.integers(3, 7))
    kinds = ["exists", "exists", "attribute", "background", "count"]
    if len(scene.objects) > 1:
        kinds += ["next to", "next to", "relation"]
    for i in rng.permutation(8 * len(kinds)).tolist():        # attempts; at least three succeed
        o = pick(rng, scene.objects)
        sentence = propose(kinds[i % len(kinds)], o, scene, mentioned, rng)
        try:
            new = sentence is not None and facts.add(sentence)
        except ValueError:                    # the sentence would be ambiguous
            continue
        if new:
            sentences.append(sentence + ".")
        if len(facts.objects) > len(mentioned):
            mentioned[o] = facts.objects[-1]
        if len(sentences) == length:
            break
    return " ".join(sentences)


def propose(kind: str, o: Object, scene: Scene, mentioned: dict, rng) -> str | None:
    """A sentence of a kind about an object, or None if what was mentioned does not allow one."""
    def phrase(o):
        """Some of the stated attributes that together are true of this object alone, or None."""
        stated = mentioned[o].values() if o in mentioned else ()
        found = [p for p in unique_phrases(scene, o) if set(p.split()) <= set(stated)]
        return pick(rng, found) if found else None

    other = pick(rng, scene.objects) if kind in ("next to", "relation") else None
    subject = phrase(o) if kind in ("attribute", "relation") else ""
    other_phrase = phrase(other) if other else ""
    if subject is None or other_phrase is None:
        return None
    rel = main_relation(o, other) if other else ""
    if kind in ("exists", "next to"):
        if o in mentioned:
            return None
        words = pick(rng, [o.size, None]), pick(rng, [o.color, o.color, None]), o.shape
        thing = with_article([word for word in words if word])
        return f"{rel} the {other_phrase} is {thing}" if other else f"there is {thing}"
    if kind == "attribute":
        return f"the {subject} is {pick(rng, [o.size, o.color])}"
    if kind == "relation":
        return f"the {subject} is {rel} the {other_phrase}"
    if kind == "background":
        return f"the background is {scene.background}"
    count = COUNTS[len(scene.objects) - 1]
    return "there is one object" if count == "one" else f"there are {count} objects"


def consistent(prefix: str, continuation: str) -> bool:
    """Whether a continuation parses, states a new fact and contradicts none of both texts."""
    facts = Facts()
    try:
        for sentence in split_sentences(prefix):
            facts.add(sentence)
        return any([facts.add(sentence) for sentence in split_sentences(continuation)])
    except ValueError:
        return False


def split_sentences(text: str) -> list[str]:
    """Sentences without their periods. ValueError if the last one has none."""
    text = text.strip()
    if text and not text.endswith("."):
        raise ValueError("the last sentence has no period")
    return text[:-1].split(". ") if text else []


def corpus(rng: np.random.Generator, n: int) -> list[str]:
    """n texts about scenes that are not held out, of every kind, to train a tokenizer on."""
    texts = []
    while len(texts) < n:
        scene = sample_scene(rng)
        texts += [caption(scene, rng), *question(scene, rng), story(scene, rng)]
    return texts[:n]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    scene = Scene("gray", (Object("circle", "red", "large", 0.4, 0.3),
                           Object("square", "blue", "small", 0.6, 0.75)))
    text = "a large red circle above a small blue square on a gray background"
    for rel, expected in (("above", True), ("left of", True), ("right of", False)):
        description = read_caption(text.replace("above", rel))
        print(f"a caption with {rel!r} is exact (expect {expected}):", is_exact(description, scene))
    print("another caption:", caption(scene, rng))
    print("a question and its answer:", *question(scene, rng))
    sentences = story(scene, rng)
    print("a story:", sentences)
    print("it is consistent (expect True), but states nothing new after itself (expect False):",
          consistent("", sentences), consistent(sentences, sentences))

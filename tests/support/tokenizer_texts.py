"""Texts that tokenizers disagree on: scripts, cases, emojis, control characters."""

import random

ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "àéîõüçñøåßÆŒÞđł",
    "İ\u0131Ii\u017fKﬁﬆẞǅŉ",
    "αβγδεΣσςΆΐᾳΩἈ",
    "абвгдЁёЖѢџ",
    "אבגדהوزحطيٰةلاﷺ",
    "कखगिीुूक़क्षதமிழ்",
    "กขคิีุู้ไทย",
    "あいうカキクゞー々",
    "한국어ㄱㅏ" + "\u1100\u1161\u11a8",
    "漢字㐀𠀀豈\U0002f800\u3007",
    "\u0301\u0300\u0308\u0323\u0327\u0345\u0344\u20e3",
    "٠١٢३४Ⅷⅷ½²①㊿",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "¡¿«»“”\u2018\u2019…—\u2013•€£°©™",
    "😀👩🏽🚀❤\ufe0f\u200d🇩🇪",
    "\x00\x01\x07\x0b\x0c\x1c\x1f\x7f\x85\xad\u200b\u200e\u2060\ufeff\ufffd\ue000\u0378",
    " \t\n\r\xa0\u1680\u2003\u2028\u2029\u202f\u3000",
    "𝐀𝔟𝟘𐐀𐐨𞤀",
)


WORDS = ";".join(
    (
        "a photo;of an astronaut;riding a horse;8k;1girl;(masterpiece:1.2);[blurry];trending_on;...;!!!;--",
        "don't;DON'T;we're;I've;it'll;he'd;I'm;'s;'\u017f;''t;o'clock;cafe\u0301;q\u0323\u0307;naïve",
        "ΟΔΥΣΣΕΥΣ;ΣΑΣ.;İstanbul;DIYARBAKIR;Straße;STRASSE;日本語;한국어;ไทย;العربية;हिन्दी;👩\u200d👩\u200d👧;👍🏽",
        "<|endoftext|>;<|startoftext|>;<|ENDOFTEXT|>;<|end\u200boftext|>;<|endoftext;!<|EndOfText|>",
    )
).split(";")


CORNERS = (
    "",
    " ",
    " \t\n ",
    "\x00",
    "\u200b",
    "a" * 3000,
    "a photo, " * 300,
    "漢" * 200,
    "😀" * 100,
    "<|endoftext|>" * 90,
)


def lines() -> list[str]:
    """A thousand texts: whole words, single characters and mixtures, 0 to about 120 characters long."""
    chance = random.Random(0)

    def piece() -> str:
        if chance.random() < 0.5:
            return chance.choice(WORDS)
        return "".join(chance.choices(chance.choice(ALPHABETS), k=chance.randint(1, 9)))

    glue = ("", " ", " ", ", ", "\n", "\u200d")
    made = ["".join(piece() + chance.choice(glue) for _ in range(chance.randint(0, 16))) for _ in range(990)]
    return [*CORNERS, *made]

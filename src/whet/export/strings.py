"""Two hundred strings that any two programs should cut into the same tokens.

All are in Unicode's composed form (NFC): llama.cpp does not normalise, so that a tokenizer that does
(Qwen's) would differ from it on others.
"""

from __future__ import annotations

import unicodedata

from whet.model import Tokenizer

NUM_STRINGS = 200
_PLAIN = (
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "don't we'll I'm they've it's you'd",
    "DON'T WE'LL I'M",
    "e.g. i.e. etc.",
    "naïve café résumé Ångström",
    "Straße, Größe, Übermut",
    "¿Qué? ¡Así!",
    "Português: não, coração",
    "Žluťoučký kůň úpěl",
    "Zażółć gęślą jaźń",
    "İstanbul ıssız",
    "Tiếng Việt rất đẹp",
    "Ελληνικά: καλημέρα",
    "Привет, как дела?",
    "Українська їжак",
    "שלום עולם",
    "مرحبا بالعالم",
    "السلام عليكم ورحمة الله",
    "١٢٣٤٥ أرقام عربية",
    "بِسْمِ اللَّهِ",
    "فارسی: می‌خواهم بدانم",
    "اردو زبان",
    "हिन्दी में नमस्ते",
    "বাংলা ভাষা",
    "தமிழ் மொழி",
    "తెలుగు",
    "ಕನ್ನಡ",
    "മലയാളം",
    "ਪੰਜਾਬੀ",
    "සිංහල",
    "ภาษาไทยไม่มีวรรค",
    "ລາວ",
    "မြန်မာ",
    "ខ្មែរ",
    "ქართული",
    "Հայերեն",
    "አማርኛ",
    "中文分词测试",
    "繁體中文測試",
    "日本語のテキスト、カタカナ",
    "ひらがな",
    "한국어 문장입니다",
    "中文 mixed with English 123",
    "🙂",
    "👍🏽👍🏿",
    "👩‍👩‍👧‍👦 family",
    "🇩🇪🇯🇵",
    "text🙂text",
    "❤️‍🔥",
    "1",
    "12",
    "123",
    "1234",
    "12345",
    "1234567890",
    "3.14159",
    "1,000,000.00",
    "0x1F",
    "1e-10",
    "2024-01-31T23:59:59Z",
    "+49 (0)30 1234-567",
    "50%",
    "$9.99 €10 £5 ¥100",
    "½ ¼ ² ³",
    "Ⅷ ⅷ",
    " leading",
    "trailing ",
    "  two  spaces  ",
    "a   b    c",
    "\ttab\ttab",
    "line\nbreak",
    "two\n\nbreaks",
    "three\n\n\nbreaks\n",
    "\n",
    "\n\n",
    " \n ",
    "\r\nwindows\r\n",
    "mixed \t \n \r\n end",
    "nbsp\u00a0here",
    "thin\u2009space",
    "zero\u200bwidth",
    "\u3000wide\u3000",
    "def f(x):\n    return x ** 2  # square\n",
    "if (a && b || !c) { d[0] += 1; }",
    "SELECT * FROM t WHERE a='b';",
    '<div class="x">text</div>',
    '{"a": [1, 2, {"b": null}]}',
    "https://example.org/a?b=c&d=%20#e",
    "me@example.org",
    "C:\\path\\file.txt",
    "/usr/local/bin",
    "snake_case camelCase PascalCase kebab-case",
    "x=1;y=2",
    "a+b=c",
    "!!!???",
    "...",
    "…",
    "—–-",
    "“quotes” ‘single’ «guillemets»",
    "(parentheses) [b] {c}",
    "***bold*** _it_ ~~no~~",
    "# Title\n\n- item\n- item\n",
    "| a | b |\n|---|---|",
    "```python\nprint()\n```",
    "∑∫√∞≠≤≥",
    "α→β ⇒ γ",
    "∀x∈ℝ",
    "A",
    "a",
    ".",
    "-",
    "'",
    '"',
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "AbCdEfGhIj",
    "Donaudampfschifffahrtsgesellschaft",
    "antidisestablishmentarianism",
    "\u00ad soft",
    "ﬁ ligature",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "𒀀 cuneiform",
    "private \ue000",
    "ß ẞ",
    "Ǆ ǆ",
    "ÿ",
    "user",
    "assistant",
    "system",
)


def sample_strings(tokenizer: Tokenizer) -> list[str]:
    """Return the strings, the tokenizer's special tokens among them.

    Args:
        tokenizer: Its special and added tokens are used.

    Returns:
        NUM_STRINGS strings.
    """
    added = tokenizer.get_added_vocab()
    own = [*dict.fromkeys([*tokenizer.all_special_tokens, *sorted(added, key=lambda t: added[t])])][
        :12
    ]
    found = [text for text in _PLAIN if unicodedata.is_normalized("NFC", text)]
    for token in own:
        found += [token, f"{token}user\nHello", f"Hi{token}", f"a {token} b"]
    pairs = ((one, two) for one, two in zip(_PLAIN, _PLAIN[7:] + _PLAIN[:7], strict=True))
    for one, two in pairs:
        if len(found) >= NUM_STRINGS:
            break
        text = unicodedata.normalize("NFC", f"{one} {two}")
        found.append(text)
    return found[:NUM_STRINGS]

"""The consent page's words. Whoever changes them changes VERSION too: those who came by invitation are then asked again."""

from __future__ import annotations

VERSION = "2026-11-25"

TITLE = "Before you begin"

TEXT = (
    "You will hear short pieces of music made by computer programs and say which you would rather hear. Your answers are used "
    "to train and to test such programs. Taking part is up to you, and you may stop whenever you like.",
    "We store the name you choose here, your answers, comments and marks, how long and which parts of each piece you listened to, "
    "when you answered, and the result of a short headphone check. We do not ask for your real name or e-mail address, "
    "nor do we record any sound around you.",
    "Your answers may be passed on to researchers without your chosen name, under a random number. Comments are passed on as you wrote "
    "them, so please name nobody in them.",
    "One cookie keeps you signed in, and this browser keeps answers that could not be sent yet. No other party is contacted.",
    "You may ask whoever invited you for a copy of what is stored about you, or to have it erased. A program that was trained on your "
    "answers cannot forget them; which ones were is on record and will be told to you.",
)

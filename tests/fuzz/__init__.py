"""Property tests of everything that a stranger may hand over: each input is taken, or refused in one sentence.

``targets`` says what is tried, ``mutations`` what is made of it, ``worker`` is the process in which it happens, and
``campaign`` starts workers again where they die. ``make fuzz`` runs it for an hour, ``test_fuzz.py`` for seconds.
"""

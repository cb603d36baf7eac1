"""Property tests of every input from outside: each must be accepted, or refused in one sentence.

``targets`` lists the inputs, ``mutations`` changes good ones, ``worker`` is the process that tries them, and
``campaign`` restarts workers that die. ``make fuzz`` runs for an hour, ``test_fuzz.py`` for seconds.
"""

"""The errors that agentforge raises on purpose: one sentence each, to be shown to the user as it is."""


class AgentForgeError(Exception):
    """An error that agentforge detected and can state in one sentence."""


class BadInput(AgentForgeError, ValueError):
    """What was given cannot be used: the message names the thing, what was expected and what to do (exit code 2)."""


class BadArtifact(BadInput):
    """An artifact on disk is damaged, incomplete or not to be trusted."""


class Incomparable(AgentForgeError, ValueError):
    """Two measurements were compared although their protocols differ."""

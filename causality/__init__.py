"""Pure inference: from recorded kernel events to causes. No I/O, no servers, no clock of its own.

`engine.NodeEngine` is the entrance. `timeline` is what mechanism resolvers (`block`, `journal`, `memory`, `network`,
`failures`) are written against.
"""

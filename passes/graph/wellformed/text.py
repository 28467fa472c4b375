"""Checks that the texts of an ONNX file are text: protobuf gives names that are no UTF-8 as bytes."""

from __future__ import annotations

from google.protobuf.message import Message
from onnx import TensorProto

from trimtab.passes.graph.wellformed.fault import MalformedError, name_of


def check_text(message: Message) -> None:
    """Check all string fields of `message` and of the messages in it. Values of tensors are not read.

    Raises:
        MalformedError: a text is not UTF-8; the message shows it.
    """
    stack = [message]
    while stack:
        current = stack.pop()
        if isinstance(current, TensorProto):
            fields = [
                (current.DESCRIPTOR.fields_by_name[name], getattr(current, name)) for name in ("name", "doc_string")
            ]
            stack.extend(current.external_data)
        else:
            fields = current.ListFields()
        for field, value in fields:
            values = value if field.is_repeated else (value,)
            if field.message_type is not None:
                stack.extend(values)
            elif field.type == field.TYPE_STRING:
                for text in values:
                    if isinstance(text, bytes):
                        raise MalformedError(f"the text {name_of(repr(text))} is not UTF-8")

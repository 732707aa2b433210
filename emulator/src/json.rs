//! JSON objects whose fields keep the order they were added in: KMS documents its replies in an order of its
//! own, and `serde_json` sorts unless a feature is on that would also change the agent's build.

use serde_json::Value;

#[derive(Debug, Default)]
pub(crate) struct Object(String);

impl Object {
    /// A field whose value is JSON already.
    pub(crate) fn raw(mut self, name: &str, json: &str) -> Object {
        self.0.push(if self.0.is_empty() { '{' } else { ',' });
        self.0.push_str(&Value::from(name).to_string());
        self.0.push(':');
        self.0.push_str(json);
        self
    }

    pub(crate) fn text(self, name: &str, value: &str) -> Object {
        self.raw(name, &Value::from(value).to_string())
    }

    /// Adds the field only when there is a value.
    pub(crate) fn maybe(self, name: &str, value: Option<&str>) -> Object {
        match value {
            Some(value) => self.text(name, value),
            None => self,
        }
    }

    pub(crate) fn number(self, name: &str, value: u64) -> Object {
        self.raw(name, &value.to_string())
    }

    /// The doubled form of lists in KMS: `{"VersionStages":{"VersionStage":["ACSCurrent"]}}`.
    pub(crate) fn list<T: AsRef<str>>(self, outer: &str, inner: &str, items: &[T]) -> Object {
        let items: Value = items.iter().map(|item| Value::from(item.as_ref())).collect();
        self.raw(outer, &Object::default().raw(inner, &items.to_string()).end())
    }

    pub(crate) fn end(mut self) -> String {
        if self.0.is_empty() {
            self.0.push('{');
        }
        self.0.push('}');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Object;

    #[test]
    fn order_is_kept_and_text_is_escaped() {
        let json =
            Object::default().text("b", "q\"\n").maybe("x", None).number("a", 7).list("c", "d", &["e"]);
        assert_eq!(json.end(), r#"{"b":"q\"\n","a":7,"c":{"d":["e"]}}"#);
        assert_eq!(Object::default().end(), "{}");
    }
}

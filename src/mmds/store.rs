//! The metadata: a JSON document of limited size.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Map, Value};

/// Bytes of metadata, written as JSON without spaces, unless another limit is set; Firecracker's.
pub const SIZE_LIMIT: usize = 51_200;

/// Why metadata cannot be changed so. The texts are Firecracker's, which its clients look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// There would be too many.
    #[error("The MMDS patch request doesn't fit.")]
    TooLarge,
    /// There are none yet.
    #[error("The MMDS data store is not initialized.")]
    Empty,
}

/// What is found at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// This text.
    Text(String),
    /// Nothing.
    Nothing,
    /// Something that has no form as text.
    NoText,
}

/// Metadata that host and guest share.
#[derive(Debug)]
pub struct Store(Mutex<Contents>);

#[derive(Debug)]
struct Contents {
    /// `None` until there are some.
    value: Option<Value>,
    limit: usize,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(SIZE_LIMIT)
    }
}

impl Store {
    /// An empty one, for so many bytes.
    pub fn new(limit: usize) -> Self {
        Self(Mutex::new(Contents { value: None, limit }))
    }

    /// Nothing leaves the contents half changed, so a panic elsewhere does not matter.
    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, if there are any.
    pub fn value(&self) -> Option<Value> {
        self.lock().value.clone()
    }

    /// Puts others in their place.
    pub fn put(&self, value: Value) -> Result<(), StoreError> {
        self.lock().set(value)
    }

    /// Merges changes into them (RFC 7396).
    pub fn patch(&self, patch: Value) -> Result<(), StoreError> {
        let mut contents = self.lock();
        let mut value = contents.value.clone().ok_or(StoreError::Empty)?;
        merge(&mut value, patch);
        contents.set(value)
    }

    /// What lies at a path, as JSON.
    pub fn json(&self, path: &str) -> Lookup {
        self.find(path, |value| Some(value.to_string()))
    }

    /// The same as EC2's service writes it: names in a directory, one in a line, or a text.
    pub fn text(&self, path: &str) -> Lookup {
        self.find(path, |value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Object(object) => Some(names(object)),
            _ => None,
        })
    }

    fn find(&self, path: &str, write: impl FnOnce(&Value) -> Option<String>) -> Lookup {
        let contents = self.lock();
        let path = path.strip_suffix('/').unwrap_or(path);
        match contents.value.as_ref().and_then(|value| value.pointer(path)) {
            None => Lookup::Nothing,
            Some(value) => write(value).map_or(Lookup::NoText, Lookup::Text),
        }
    }
}

impl Contents {
    fn set(&mut self, value: Value) -> Result<(), StoreError> {
        if value.to_string().len() > self.limit {
            return Err(StoreError::TooLarge);
        }
        self.value = Some(value);
        Ok(())
    }
}

fn names(object: &Map<String, Value>) -> String {
    let name = |(name, value): (&String, &Value)| {
        let mark = if value.is_object() { "/" } else { "" };
        format!("{name}{mark}")
    };
    object.iter().map(name).collect::<Vec<_>>().join("\n")
}

/// RFC 7396. How deep it goes is limited by how deep JSON may be that is read.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(&name);
        } else {
            merge(target.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(text: &str) -> Lookup {
        Lookup::Text(text.to_owned())
    }

    #[test]
    fn paths_lead_to_text_and_json() {
        let store = Store::default();
        assert_eq!((store.json("/"), store.text("/a")), (Lookup::Nothing, Lookup::Nothing));
        store
            .put(json!({"latest": {"meta-data": {"id": "i-1", "tags": {}}, "n": 7}, "list": ["x"], "a/b": "y"}))
            .unwrap();
        assert_eq!(store.text("/"), text("a/b\nlatest/\nlist"));
        for path in ["/latest/meta-data", "/latest/meta-data/"] {
            assert_eq!(store.text(path), text("id\ntags/"));
            assert_eq!(store.json(path), text(r#"{"id":"i-1","tags":{}}"#));
        }
        assert_eq!(store.text("/latest/meta-data/id"), text("i-1"));
        assert_eq!(store.json("/latest/meta-data/id"), text("\"i-1\""));
        assert_eq!((store.text("/list/0"), store.text("/a~1b")), (text("x"), text("y")));
        assert_eq!((store.text("/latest/n"), store.text("/list")), (Lookup::NoText, Lookup::NoText));
        assert_eq!(store.json("/latest/n"), text("7"));
        for path in ["/late", "latest", "/latest/meta-data/id/x", "/list/1", "/list/-", "/latest//n"] {
            assert_eq!(store.text(path), Lookup::Nothing, "{path}");
        }
    }

    #[test]
    fn patches_are_merged() {
        // The examples of RFC 7396.
        for (target, patch, result) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
            (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
            (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
            (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
        ] {
            let store = Store::default();
            store.put(target).unwrap();
            store.patch(patch).unwrap();
            assert_eq!(store.value(), Some(result));
        }
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let store = Store::new(20);
        assert_eq!(store.patch(json!({"a": 1})), Err(StoreError::Empty));
        assert_eq!(store.put(json!("x".repeat(19))), Err(StoreError::TooLarge));
        assert_eq!(store.value(), None);
        store.put(json!("x".repeat(18))).unwrap();
        store.put(json!({"a": "bcd"})).unwrap();
        assert_eq!(store.patch(json!({"b": "0123456789"})), Err(StoreError::TooLarge));
        assert_eq!(store.value(), Some(json!({"a": "bcd"})));
        assert_eq!(store.patch(json!({"a": null, "b": "0123456"})), Ok(()));
    }
}

//! Turns a command's `arguments` into its typed struct, with QEMU's wording for everything that does not fit.
//!
//! serde's own messages speak of Rust types and know no path; QEMU's name the member, as in
//! `Parameter 'channels[0].addr.port' is missing`. So this is a deserializer over [`Value`] whose errors are kept in
//! parts until they have passed every container on their way out, each of which puts its own step in front.

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, EnumAccess, Error as _, Expected,
    IntoDeserializer, MapAccess, SeqAccess, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Map, Value};

use crate::error::QmpError;

/// Reads a command's arguments.
///
/// # Errors
/// Generic errors in QEMU's words, for a member that is missing, unexpected, or of the wrong type or value.
pub(crate) fn decode<T: DeserializeOwned>(arguments: &Map<String, Value>) -> Result<T, QmpError> {
    T::deserialize(Members(arguments)).map_err(|error| QmpError::generic(error.to_string()))
}

/// What is wrong with an argument.
#[derive(Debug)]
enum Fault {
    Missing,
    Unexpected,
    Type(&'static str),
    NotUnsigned,
    Variant(String),
    /// A complete sentence from a type's own checks.
    Other(String),
}

/// A [`Fault`] and the way to it, outermost step last.
#[derive(Debug)]
struct ArgumentError {
    fault: Fault,
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    Member(String),
    Element(usize),
}

impl ArgumentError {
    fn at(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    fn path(&self) -> String {
        let mut path = String::new();
        for step in self.steps.iter().rev() {
            match step {
                Step::Member(name) if path.is_empty() => path.push_str(name),
                Step::Member(name) => {
                    path.push('.');
                    path.push_str(name);
                }
                Step::Element(index) => path.push_str(&format!("[{index}]")),
            }
        }
        path
    }

    fn last_member(&self) -> &str {
        self.steps
            .iter()
            .find_map(|step| match step {
                Step::Member(name) => Some(name.as_str()),
                Step::Element(_) => None,
            })
            .unwrap_or_default()
    }
}

impl From<Fault> for ArgumentError {
    fn from(fault: Fault) -> Self {
        ArgumentError {
            fault,
            steps: Vec::new(),
        }
    }
}

impl std::fmt::Display for ArgumentError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.fault {
            Fault::Missing => write!(f, "Parameter '{}' is missing", self.path()),
            Fault::Unexpected => write!(f, "Parameter '{}' is unexpected", self.path()),
            Fault::Type(expected) => write!(
                f,
                "Invalid parameter type for '{}', expected: {expected}",
                self.path()
            ),
            Fault::NotUnsigned => write!(f, "Parameter '{}' expects uint64", self.path()),
            // QEMU gives the member alone here, without the way to it.
            Fault::Variant(value) => write!(
                f,
                "Parameter '{}' does not accept value '{value}'",
                self.last_member()
            ),
            Fault::Other(sentence) => f.write_str(sentence),
        }
    }
}

impl std::error::Error for ArgumentError {}

impl serde::de::Error for ArgumentError {
    fn custom<T: std::fmt::Display>(sentence: T) -> Self {
        Fault::Other(sentence.to_string()).into()
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        // serde describes what it expected in words of its own; these are the ones its derive and its
        // implementations for primitive types use.
        match expected.to_string().as_str() {
            "u64" => Fault::NotUnsigned,
            "i64" => Fault::Type("integer"),
            "f64" => Fault::Type("number"),
            "a boolean" => Fault::Type("boolean"),
            "a string" => Fault::Type("string"),
            "a sequence" => Fault::Type("array"),
            _ => Fault::Type("object"),
        }
        .into()
    }

    fn invalid_value(unexpected: Unexpected<'_>, expected: &dyn Expected) -> Self {
        ArgumentError::invalid_type(unexpected, expected)
    }

    fn unknown_variant(variant: &str, _: &'static [&'static str]) -> Self {
        Fault::Variant(variant.to_owned()).into()
    }

    fn unknown_field(field: &str, _: &'static [&'static str]) -> Self {
        ArgumentError::from(Fault::Unexpected).at(Step::Member(field.to_owned()))
    }

    fn missing_field(field: &'static str) -> Self {
        ArgumentError::from(Fault::Missing).at(Step::Member(field.to_owned()))
    }
}

/// A JSON object being read.
struct Members<'a>(&'a Map<String, Value>);

impl<'de> Deserializer<'de> for Members<'_> {
    type Error = ArgumentError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ArgumentError> {
        visitor.visit_map(MemberAccess {
            rest: self.0.iter(),
            current: None,
        })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct MemberAccess<'a> {
    rest: serde_json::map::Iter<'a>,
    current: Option<(&'a String, &'a Value)>,
}

impl<'de> MapAccess<'de> for MemberAccess<'_> {
    type Error = ArgumentError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, ArgumentError> {
        self.current = self.rest.next();
        self.current
            .map(|(name, _)| {
                let name: StrDeserializer<'_, ArgumentError> = name.as_str().into_deserializer();
                seed.deserialize(name)
            })
            .transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(
        &mut self,
        seed: V,
    ) -> Result<V::Value, ArgumentError> {
        let (name, value) = self.current.ok_or_else(|| {
            ArgumentError::custom("a member's value was asked for before its name")
        })?;
        seed.deserialize(Member(value))
            .map_err(|error| error.at(Step::Member(name.clone())))
    }
}

/// A JSON value being read.
struct Member<'a>(&'a Value);

impl<'de> Deserializer<'de> for Member<'_> {
    type Error = ArgumentError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ArgumentError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::String(value) => visitor.visit_str(value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(value), _) => visitor.visit_u64(value),
                (_, Some(value)) => visitor.visit_i64(value),
                _ => visitor.visit_f64(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::Array(elements) => visitor.visit_seq(ElementAccess(elements.iter().enumerate())),
            Value::Object(members) => Members(members).deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ArgumentError> {
        // An optional argument is left out, never null.
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, ArgumentError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ArgumentError> {
        match self.0 {
            Value::Object(members) => Members(members).deserialize_any(visitor),
            // serde's derive would take an array for a struct, member by member.
            _ => Err(Fault::Type("object").into()),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ArgumentError> {
        match self.0 {
            Value::String(name) => visitor.visit_enum(Name(name)),
            _ => Err(Fault::Type("string").into()),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map identifier ignored_any
    }
}

struct ElementAccess<'a>(std::iter::Enumerate<std::slice::Iter<'a, Value>>);

impl<'de> SeqAccess<'de> for ElementAccess<'_> {
    type Error = ArgumentError;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, ArgumentError> {
        self.0
            .next()
            .map(|(index, value)| {
                seed.deserialize(Member(value))
                    .map_err(|error| error.at(Step::Element(index)))
            })
            .transpose()
    }
}

/// A name out of an enumeration. QAPI's enumerations carry no data.
struct Name<'a>(&'a str);

impl<'de> EnumAccess<'de> for Name<'_> {
    type Error = ArgumentError;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Self), ArgumentError> {
        let name: StrDeserializer<'_, ArgumentError> = self.0.into_deserializer();
        Ok((seed.deserialize(name)?, self))
    }
}

impl<'de> VariantAccess<'de> for Name<'_> {
    type Error = ArgumentError;

    fn unit_variant(self) -> Result<(), ArgumentError> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(
        self,
        _: T,
    ) -> Result<T::Value, ArgumentError> {
        Err(Fault::Type("object").into())
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, ArgumentError> {
        Err(Fault::Type("object").into())
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, ArgumentError> {
        Err(Fault::Type("object").into())
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Colour {
        DarkRed,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    #[expect(dead_code, reason = "only read to see what does not fit")]
    struct Inner {
        port: String,
        colour: Option<Colour>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "kebab-case", deny_unknown_fields)]
    #[expect(dead_code, reason = "only read to see what does not fit")]
    struct Outer {
        signed: Option<i64>,
        unsigned: Option<u64>,
        flag: Option<bool>,
        text: Option<String>,
        number: Option<f64>,
        list: Option<Vec<Inner>>,
    }

    fn complaint(arguments: Value) -> String {
        let Value::Object(arguments) = arguments else {
            panic!("arguments are an object")
        };
        decode::<Outer>(&arguments).unwrap_err().desc
    }

    #[test]
    fn wording_is_qemus() {
        let wrong = "Invalid parameter type for";
        for (arguments, expected) in [
            (
                json!({"signed": "a"}),
                format!("{wrong} 'signed', expected: integer"),
            ),
            (
                json!({"signed": null}),
                format!("{wrong} 'signed', expected: integer"),
            ),
            (
                json!({"unsigned": "a"}),
                "Parameter 'unsigned' expects uint64".into(),
            ),
            (
                json!({"unsigned": -1}),
                "Parameter 'unsigned' expects uint64".into(),
            ),
            (
                json!({"unsigned": 1.5}),
                "Parameter 'unsigned' expects uint64".into(),
            ),
            (
                json!({"flag": 1}),
                format!("{wrong} 'flag', expected: boolean"),
            ),
            (
                json!({"text": []}),
                format!("{wrong} 'text', expected: string"),
            ),
            (
                json!({"number": "a"}),
                format!("{wrong} 'number', expected: number"),
            ),
            (
                json!({"list": 5}),
                format!("{wrong} 'list', expected: array"),
            ),
            (
                json!({"list": [5]}),
                format!("{wrong} 'list[0]', expected: object"),
            ),
            (
                json!({"list": [["1"]]}),
                format!("{wrong} 'list[0]', expected: object"),
            ),
            (
                json!({"list": [{}]}),
                "Parameter 'list[0].port' is missing".into(),
            ),
            (
                json!({"list": [{"port": "1"}, {"port": 1}]}),
                format!("{wrong} 'list[1].port', expected: string"),
            ),
            (
                json!({"list": [{"port": "1", "colour": "blue"}]}),
                "Parameter 'colour' does not accept value 'blue'".into(),
            ),
            (
                json!({"list": [{"port": "1", "colour": 1}]}),
                format!("{wrong} 'list[0].colour', expected: string"),
            ),
            (json!({"foo": 1}), "Parameter 'foo' is unexpected".into()),
        ] {
            assert_eq!(complaint(arguments.clone()), expected, "for {arguments}");
        }
    }
}

//! `#[derive(Event)]` for udpack; use it as `udpack::Event`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::{Data, DeriveInput, LitStr, Type, parse_quote};

/// Implements the trait `Event` for a struct or an enum: its name on the wire and the type of its answer.
///
/// ```text
/// #[derive(Serialize, Deserialize, udpack::Event)]
/// #[event(name = "say", reply = Seen)]
/// struct Say { text: String }
/// ```
///
/// `name` defaults to the type's own name in snake_case and follows the rules for event names: 1 to 128 bytes,
/// no control characters, no leading `$`. `reply` defaults to `()`. Breaking a rule is an error of the
/// compiler at the word that breaks it.
#[proc_macro_derive(Event, attributes(event))]
pub fn derive_event(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = syn::parse_macro_input!(input as DeriveInput);
    expand(input)
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

fn expand(input: DeriveInput) -> syn::Result<TokenStream> {
    if let Data::Union(data) = &input.data {
        let text = "an event is a struct or an enum: a union cannot be sent";
        return Err(syn::Error::new(data.union_token.span, text));
    }
    if let Some(lifetime) = input.generics.lifetimes().next() {
        let text = "an event owns its data, because it is also received: no lifetime parameters";
        return Err(syn::Error::new_spanned(lifetime, text));
    }
    let Attribute { name, reply } = Attribute::of(&input)?;
    let name = match name {
        Some(name) => name,
        None => {
            let name = snake_case(&input.ident.unraw().to_string());
            checked(LitStr::new(&name, input.ident.span()))?
        }
    };
    let reply = reply.unwrap_or_else(|| parse_quote!(()));
    let ident = &input.ident;
    let mut generics = input.generics.clone();
    if generics.params.iter().any(|param| !is_const(param)) {
        // What the parameters must be for the type to travel, serde has found out already.
        generics.make_where_clause().predicates.push(parse_quote!(
            Self: ::udpack::__private::Serialize + ::udpack::__private::DeserializeOwned
        ));
    }
    let (parameters, arguments, bounds) = generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #parameters ::udpack::Event for #ident #arguments #bounds {
            const NAME: &'static str = #name;
            type Reply = #reply;
        }
    })
}

fn is_const(param: &syn::GenericParam) -> bool {
    matches!(param, syn::GenericParam::Const(_))
}

/// What `#[event(…)]` says.
#[derive(Default)]
struct Attribute {
    name: Option<LitStr>,
    reply: Option<Type>,
}

impl Attribute {
    fn of(input: &DeriveInput) -> syn::Result<Self> {
        let mut said = Self::default();
        for attr in input
            .attrs
            .iter()
            .filter(|attr| attr.path().is_ident("event"))
        {
            attr.parse_nested_meta(|meta| said.read(&meta))?;
        }
        Ok(said)
    }

    fn read(&mut self, meta: &ParseNestedMeta<'_>) -> syn::Result<()> {
        if meta.path.is_ident("name") {
            once(meta, self.name.is_some())?;
            self.name = Some(checked(meta.value()?.parse()?)?);
        } else if meta.path.is_ident("reply") {
            once(meta, self.reply.is_some())?;
            self.reply = Some(meta.value()?.parse()?);
        } else {
            return Err(meta.error("unknown key: `name` and `reply` are known"));
        }
        Ok(())
    }
}

fn once(meta: &ParseNestedMeta<'_>, before: bool) -> syn::Result<()> {
    if before {
        return Err(meta.error("said before"));
    }
    Ok(())
}

/// The rules of udpack for the names of events.
fn checked(name: LitStr) -> syn::Result<LitStr> {
    let value = name.value();
    let text = if value.is_empty() {
        "the name of an event is not empty".to_owned()
    } else if value.len() > LONGEST {
        format!(
            "the name of an event has at most {LONGEST} bytes, this one has {}",
            value.len()
        )
    } else if value.starts_with('$') {
        "names that start with $ are the protocol's own".to_owned()
    } else if value.contains(char::is_control) {
        "the name of an event has no control characters".to_owned()
    } else {
        return Ok(name);
    };
    Err(syn::Error::new(name.span(), text))
}

/// `SayHello` and `HTTPRequest` as `say_hello` and `http_request`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    let mut before: Option<char> = None;
    let mut chars = name.chars().peekable();
    while let Some(c) = chars.next() {
        if c.is_uppercase() {
            let begins = match before {
                None | Some('_') => false,
                Some(before) if before.is_uppercase() => {
                    chars.peek().is_some_and(|next| next.is_lowercase())
                }
                Some(_) => true,
            };
            if begins {
                out.push('_');
            }
            out.extend(c.to_lowercase());
        } else {
            out.push(c);
        }
        before = Some(c);
    }
    out
}

/// Bytes of the longest name, as in udpack's protocol.
const LONGEST: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(input: DeriveInput) -> String {
        expand(input).expect_err("not an event").to_string()
    }

    fn named(name: &str) -> DeriveInput {
        parse_quote!(
            #[event(name = #name)]
            struct Say;
        )
    }

    #[test]
    fn says_its_name_and_the_type_of_its_answer() {
        let made = expand(parse_quote!(
            #[event(name = "say", reply = Vec<Seen>)]
            enum Say {
                Loud(String),
                Soft,
            }
        ));
        let wanted = quote! {
            #[automatically_derived]
            impl ::udpack::Event for Say {
                const NAME: &'static str = "say";
                type Reply = Vec<Seen>;
            }
        };
        assert_eq!(made.expect("an event").to_string(), wanted.to_string());
    }

    #[test]
    fn without_words_the_name_is_the_types_own_and_the_answer_is_nothing() {
        let made = expand(parse_quote!(
            struct SayHello {
                text: String,
            }
        ));
        let wanted = quote! {
            #[automatically_derived]
            impl ::udpack::Event for SayHello {
                const NAME: &'static str = "say_hello";
                type Reply = ();
            }
        };
        assert_eq!(made.expect("an event").to_string(), wanted.to_string());
    }

    #[test]
    fn a_generic_event_is_one_where_serde_can_send_it() {
        let made = expand(parse_quote!(
            struct Wrapped<T: Clone, const N: usize>([T; N])
            where
                T: Copy;
        ));
        let wanted = quote! {
            #[automatically_derived]
            impl<T: Clone, const N: usize> ::udpack::Event for Wrapped<T, N>
            where
                T: Copy,
                Self: ::udpack::__private::Serialize + ::udpack::__private::DeserializeOwned
            {
                const NAME: &'static str = "wrapped";
                type Reply = ();
            }
        };
        assert_eq!(made.expect("an event").to_string(), wanted.to_string());
    }

    #[test]
    fn every_broken_rule_has_its_own_words() {
        for (input, text) in [
            (named(""), "not empty"),
            (named("$say"), "the protocol's own"),
            (named("a\nb"), "no control characters"),
            (
                named(&"x".repeat(129)),
                "at most 128 bytes, this one has 129",
            ),
            (
                parse_quote!(
                    #[event(named = "say")]
                    struct Say;
                ),
                "unknown key",
            ),
            (
                parse_quote!(
                    #[event(name = "a", name = "b")]
                    struct Say;
                ),
                "said before",
            ),
            (
                parse_quote!(
                    #[event(name = 1)]
                    struct Say;
                ),
                "expected string literal",
            ),
            (
                parse_quote!(
                    #[event]
                    struct Say;
                ),
                "expected attribute arguments",
            ),
            (parse_quote!(union Say { a: u8 }), "struct or an enum"),
            (
                parse_quote!(
                    struct Say<'a>(&'a str);
                ),
                "no lifetime parameters",
            ),
        ] {
            let error = refused(input);
            assert!(error.contains(text), "{text}: {error}");
        }
        expand(named(&"x".repeat(128))).expect("128 bytes are allowed");
    }

    #[test]
    fn type_names_become_snake_case() {
        for (name, wire) in [
            ("Say", "say"),
            ("SayHello", "say_hello"),
            ("HTTPRequest", "http_request"),
            ("UserID", "user_id"),
            ("V2Say", "v2_say"),
            ("Say_Hello", "say_hello"),
            ("say", "say"),
            ("Größe", "größe"),
        ] {
            assert_eq!(snake_case(name), wire);
        }
    }
}
